"""Number formats: what fp32, bf16, fp16 and FP8 keep of a number, and what that does to PRIME.

A format spends its bits on range (exponent) or on fineness (mantissa):

    fp32  8 + 23 bits    bf16  8 + 7     the range of fp32, 2 to 3 digits
    fp16  5 + 10 bits    finer than bf16, but nothing above 65504 or below 6e-8
    E4M3  4 + 3 bits     up to 448, in steps of 1/8: weights and activations
    E5M2  5 + 2 bits     up to 57344, in steps of 1/4: gradients, whose sizes differ more

**Master weights are fp32, always.** An update of 1e-6 times a weight is far below bf16's step of
1/128 of that weight and would be rounded away each time; in fp32 it adds up.

**fp16 needs loss scaling.** Many gradients are below 6e-8 and would vanish, so the loss is
multiplied by a factor before the backward pass, and the gradients are divided by it in fp32. Too
large a factor makes one overflow: that step is skipped and the factor halved (after `hysteresis`
overflows); after `loss_scale_window` steps without one it is doubled.

**FP8 is the layers' matrix products only.** Inputs, weights and gradients of the linear layers are
rounded to FP8, products are summed up in fp32, results are bf16; norms, attention, embedding and
output layer never see FP8. A scale brings a matrix into the small range beforehand: its largest
absolute value (amax) lands at the format's. The recipes differ in who shares a scale:

    delayed     one scale per tensor, from the amax of past training steps: nothing has to be
                measured before rounding, but a sudden outlier is cut off, the first step has a
                scale of 1, and so has a model that never trains (it is refused for the reference)
    tensorwise  one scale per tensor, from its own amax: always fits, costs one more pass
    blockwise   one scale per 1 x 128 values of an activation and per 128 x 128 of a weight: an
                outlier costs fineness in its block only
    mxfp8       one scale per 1 x 32 values, a power of two in 8 bits (E8M0), applied by the tensor
                cores of Blackwell themselves

`fp8 = "hybrid"` rounds gradients to E5M2, whose range a single scale per tensor needs; `"e4m3"`
takes E4M3 for all, which the block recipes can afford. The first and last layers matter most to the
output and are few: `first_last_layers_bf16` leaves them alone. Sizes must be multiples of 16, 32 or
128 (`precision_rules.py`), so packs are padded.

**`fp8_param` drops the bf16 weights**, which are rounded anew for each step otherwise. It saves
their memory and half of the bytes that data-parallel ranks gather. The fp32 masters stay;
checkpoints, exports and the rollout engine get dequantised values. A frozen model has no masters:
what it loads is rounded for good.

**The PRM is the delicate one.** Its reward is beta * (log prm - log ref), a difference of near
numbers: at the start prm = ref and the true reward is 0, so what rounding leaves *is* the reward.
An error of 0.01 nats in a log-prob is harmless in a ratio that is clipped at 0.2, and may be as
much as what a young PRM says of a token. So FP8 is off for it by default, and while it is on each
step logs how far it moves log-probs (`prm/fp8_logprob_error`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.utils import get_te_version

from megatron_prime.config import PrecisionOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_options(options: PrecisionOptions) -> dict[str, Any]:
    """The options of Megatron's TransformerConfig that `[precision]` owns."""
    dtype = DTYPES[options.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": options.dtype == "bf16",
        "fp16": options.dtype == "fp16",
        "fp8": options.fp8,
        "fp8_recipe": options.fp8_recipe,
        "fp8_param": options.fp8_param,
        "first_last_layers_bf16": options.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": options.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": options.num_layers_at_end_in_bf16,
    }


def optimizer_options(options: PrecisionOptions) -> dict[str, Any]:
    """The options of Megatron's OptimizerConfig: types, loss scaling, FP8 weights."""
    return {
        "params_dtype": DTYPES[options.dtype],
        "bf16": options.dtype == "bf16",
        "fp16": options.dtype == "fp16",
        "loss_scale": options.loss_scale,
        "initial_loss_scale": options.initial_loss_scale,
        "min_loss_scale": options.min_loss_scale,
        "loss_scale_window": options.loss_scale_window,
        "hysteresis": options.hysteresis,
        "fp8_recipe": options.fp8_recipe if options.fp8 else None,
        "reuse_grad_buf_for_mxfp8_param_ag": _shares_grad_buffer(options),
    }


def ddp_options(options: PrecisionOptions) -> dict[str, Any]:
    """The options of Megatron's DistributedDataParallelConfig: how FP8 weights are gathered."""
    return {
        "fp8_param_gather": options.fp8_param,
        "reuse_grad_buf_for_mxfp8_param_ag": _shares_grad_buffer(options),
    }


def _shares_grad_buffer(options: PrecisionOptions) -> bool:
    """MXFP8 weights keep two copies, scaled along rows and along columns, and can't be gathered as
    they are: they come as bf16 through the gradients' buffer and are rounded on arrival."""
    return options.fp8_param and options.fp8_recipe == "mxfp8"


@dataclass(frozen=True, slots=True)
class Chip:
    """What decides whether a recipe can run here."""

    name: str
    capability: tuple[int, int] | None  # CUDA compute capability; None without a CUDA device
    cuda: tuple[int, int]  # version that torch was built with
    transformer_engine: tuple[int, int] | None  # version; None when it is not installed

    @classmethod
    def here(cls) -> Self:
        """This process's device and packages."""
        engine = get_te_version()
        installed = None if engine is None else (engine.major, engine.minor)
        if not torch.cuda.is_available():
            return cls("CPU", None, (0, 0), installed)
        return cls(
            torch.cuda.get_device_name(),
            torch.cuda.get_device_capability(),
            _major_minor(torch.version.cuda or "0.0"),
            installed,
        )


@dataclass(frozen=True, slots=True)
class _Needs:
    """What Transformer Engine's own check of a recipe, and Megatron's, ask for."""

    transformer_engine: tuple[int, int]  # megatron/core/fp8_utils.py, get_fp8_recipe
    capability: tuple[int, int]  # transformer_engine/pytorch/quantization.py, _compute_…_support
    below: tuple[int, int] = (99, 0)  # first capability that can't any more
    cuda: tuple[int, int] = (12, 1)


_NEEDS = {
    "delayed": _Needs((1, 0), (8, 9)),
    "tensorwise": _Needs((2, 2), (8, 9)),
    "blockwise": _Needs((2, 3), (9, 0), cuda=(12, 9)),
    "mxfp8": _Needs((2, 1), (10, 0), below=(12, 0)),
}


def chip_problems(name: str, options: PrecisionOptions, chip: Chip) -> Iterator[str]:
    """Why the model `name` can't have its number formats on this chip."""
    if options.fp8 is None:
        return
    recipe, needs = options.fp8_recipe, _NEEDS[options.fp8_recipe]
    knob, remedy = f"precision.{name}.fp8_recipe", f"or remove precision.{name}.fp8"
    if chip.capability is None:
        yield f"precision.{name}.fp8: found a {chip.name}, wanted a CUDA device; remove it"
        return
    if not needs.capability <= chip.capability < needs.below:
        below = "" if needs.below == (99, 0) else f" and below {_dotted(needs.below)}"
        can = [other for other, n in _NEEDS.items() if n.capability <= chip.capability < n.below]
        yield (
            f"{knob}: {recipe!r} needs compute capability {_dotted(needs.capability)} or "
            f"higher{below}, found {_dotted(chip.capability)} ({chip.name}), which can do "
            f"{', '.join(can) or 'no FP8 at all'}; take another {remedy}"
        )
    if chip.cuda < needs.cuda:
        yield (
            f"{knob}: {recipe!r} needs a torch built with CUDA {_dotted(needs.cuda)} or newer, "
            f"found {_dotted(chip.cuda)}; install another build, take another recipe {remedy}"
        )
    if chip.transformer_engine is None:
        yield (
            f"{knob}: {recipe!r} needs Transformer Engine, which is not installed: "
            f"pip install transformer-engine[pytorch] {remedy}"
        )
    elif chip.transformer_engine < needs.transformer_engine:
        yield (
            f"{knob}: {recipe!r} needs Transformer Engine {_dotted(needs.transformer_engine)} or "
            f"newer, found {_dotted(chip.transformer_engine)}: "
            f"pip install -U transformer-engine[pytorch] {remedy}"
        )


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@contextmanager
def without_fp8(*models: torch.nn.Module) -> Iterator[None]:
    """Let the forwards inside multiply in bf16.

    Weights that are kept in FP8 (`fp8_param`) are dequantised, but stay rounded.
    """
    before = [(config, config.fp8) for config in _configs(models)]
    try:
        for config, _ in before:
            config.fp8 = None
        yield
    finally:
        for config, fp8 in before:
            config.fp8 = fp8


def _configs(models: Iterable[torch.nn.Module]) -> list[Any]:
    """The TransformerConfigs that the modules look at during a forward, each once."""
    modules = [module for model in models for module in model.modules()]
    configs = [getattr(module, "config", None) for module in modules]
    return list({id(config): config for config in configs if hasattr(config, "fp8")}.values())
