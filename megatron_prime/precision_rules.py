"""What the number formats of `[precision]` ask of knobs and shapes; pure, and without torch.

FP8 matrix products are picky about sizes: Transformer Engine wants every side of its matrices to be
a multiple of 16 (`delayed`, `tensorwise`), of 32 (`mxfp8`) or of 128 (`blockwise`); the last two
are the number of neighbours that share a scale. A side is either a dimension of the model, cut by
tensor parallelism, or the number of tokens that go through at once. The first is known from
config.json, the second is made right by padding (`token_multiple`). The embedding and the output
layer stay in bf16, so the vocabulary's size does not matter.

What the formats are is told in `models/precision.py`; what the chip can do is checked there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from megatron_prime.config import PrecisionOptions

MULTIPLES = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}

# Options of Megatron's TransformerConfig that a `[precision.…]` table owns, per model.
OWNED = (
    "fp8",
    "fp8_recipe",
    "fp8_param",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "bf16",
    "fp16",
    "params_dtype",
    "pipeline_dtype",
)


class Fp8Choice(Protocol):
    """The two options that decide about sizes; `PrecisionOptions` and TransformerConfig fit."""

    @property
    def fp8(self) -> str | None:
        """The format; None is no FP8."""

    @property
    def fp8_recipe(self) -> str | None:
        """How values are scaled."""


def token_multiple(options: Fp8Choice, ranks: int = 1) -> int:
    """What the tokens of a micro-batch must be a multiple of, padding included.

    `ranks` share the tokens (sequence or context parallelism), and each one's share goes through
    an FP8 matrix product, or is gathered in FP8, on its own.
    """
    return ranks * (MULTIPLES[str(options.fp8_recipe)] if options.fp8 else 1)


def option_problems(name: str, options: PrecisionOptions) -> Iterator[str]:
    """Knobs of `[precision.name]` that contradict each other."""
    table = f"precision.{name}"
    if options.fp8 is None:
        for knob in ("fp8_param", "first_last_layers_bf16"):
            if getattr(options, knob):
                yield f"{table}.{knob}: found true without {table}.fp8; set fp8 or remove it"
    elif options.dtype != "bf16":
        yield (
            f"{table}.dtype: found {options.dtype!r}, wanted 'bf16' beside {table}.fp8: it is the "
            "type of all that is not FP8"
        )
    if options.fp8 and options.fp8_recipe == "delayed":
        if options.first_last_layers_bf16:
            yield (
                f"{table}.first_last_layers_bf16: found true, wanted false with fp8_recipe = "
                "'delayed', whose maxima are collected over all layers at once; take 'tensorwise'"
            )
        if options.fp8_param:
            yield (
                f"{table}.fp8_param: found true, wanted false with fp8_recipe = 'delayed', which "
                "has no scale yet when weights are loaded and would round them crudely; take "
                "'tensorwise'"
            )
        if name == "reference":
            yield (
                f"{table}.fp8_recipe: found 'delayed', wanted another: its scales come from past "
                "training steps, and the reference never trains; take 'tensorwise'"
            )
    if options.loss_scale is not None and options.dtype != "fp16":
        yield (
            f"{table}.loss_scale: found {options.loss_scale}, wanted none with {table}.dtype = "
            f"{options.dtype!r}: only fp16 needs it"
        )
    if options.initial_loss_scale < options.min_loss_scale:
        yield (
            f"{table}.initial_loss_scale: found {options.initial_loss_scale}, wanted at least "
            f"{table}.min_loss_scale = {options.min_loss_scale}"
        )


def megatron_problems(megatron: Mapping[str, Any], fp8_models: Iterable[str]) -> Iterator[str]:
    """Options of `[megatron]` that belong to `[precision]`, or that rule out FP8."""
    for key in OWNED:
        if key in megatron:
            yield (
                f"megatron.{key}: each model has its own number formats; move it to "
                "[precision.policy], [precision.prm] or [precision.reference]"
                + ("" if key in PrecisionOptions.model_fields else ", where it is called dtype")
            )
    for key in ("fp4", "fp4_param"):
        if megatron.get(key):
            yield f"megatron.{key}: found {megatron[key]!r}, not supported; remove it"
    if megatron.get("transformer_impl") == "local":
        for name in fp8_models:
            yield (
                f"megatron.transformer_impl: found 'local', but precision.{name}.fp8 needs "
                "Transformer Engine's layers; remove one of the two"
            )


def shape_problems(
    name: str, options: PrecisionOptions, model: Mapping[str, Any], knob: str, tp: int, pp: int
) -> Iterator[str]:
    """Dimensions of a model's config.json that the recipe can't multiply.

    `model` (with the family's defaults) is the one that `knob` names, cut over `tp`
    tensor-parallel ranks and `pp` stages.
    """
    if options.fp8 is None:
        return
    multiple = MULTIPLES[options.fp8_recipe]
    for what, size in _sides(model, tp).items():
        if size % multiple:
            yield (
                f"precision.{name}.fp8_recipe: found {options.fp8_recipe!r}, which wants multiples "
                f"of {multiple}, but {what} = {size} in {knob}; take another recipe or "
                f"megatron.tensor_model_parallel_size, or remove precision.{name}.fp8"
            )
    if options.first_last_layers_bf16:
        most = model["num_hidden_layers"] // pp
        for side in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if (found := getattr(options, side)) > most:
                yield (
                    f"precision.{name}.{side}: found {found}, wanted at most the {most} layers of "
                    f"a pipeline stage of {knob}"
                )


def _sides(model: Mapping[str, Any], tp: int) -> dict[str, int]:
    """The sides of the layers' weight matrices on one tensor-parallel rank."""
    heads = model["num_attention_heads"]
    head_dim, kv_heads = model["head_dim"], model["num_key_value_heads"]
    share = f" / tensor_model_parallel_size {tp}" if tp > 1 else ""
    return {
        "hidden_size": model["hidden_size"],
        f"num_attention_heads * head_dim{share}": heads * head_dim // tp,
        f"(num_attention_heads + 2 * num_key_value_heads) * head_dim{share}": (
            (heads + 2 * kv_heads) * head_dim // tp
        ),
        f"intermediate_size{share}": model["intermediate_size"] // tp,
    }
