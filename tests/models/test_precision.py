"""Number formats as Megatron's options, what a chip can't do, and forwards without FP8."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prime.config import PrecisionOptions, PrmSection, RunConfig
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
precision = pytest.importorskip("megatron_prime.models.precision")
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_prime import precision_rules  # noqa: E402
from megatron_prime.models.guard import Guard  # noqa: E402
from megatron_prime.models.mini_batch import loss_scaling  # noqa: E402
from megatron_prime.models.prm import MegatronPrm  # noqa: E402
from megatron_prime.models.training import StepResult  # noqa: E402
from megatron_prime.types import OldLogprobs, RolloutBatch, ScoredBatch, TokenSequence  # noqa: E402

Chip = precision.Chip
HOPPER = Chip("NVIDIA H100", (9, 0), cuda=(12, 9), transformer_engine=(2, 8))
ADA = replace(HOPPER, name="NVIDIA L40S", capability=(8, 9))
AMPERE = replace(HOPPER, name="NVIDIA A100", capability=(8, 0))
BLACKWELL = replace(HOPPER, name="NVIDIA B200", capability=(10, 0))
WORKSTATION = replace(HOPPER, name="NVIDIA RTX PRO 6000", capability=(12, 0))
CPU = Chip("CPU", None, cuda=(0, 0), transformer_engine=None)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def fp8(recipe: str, **knobs: Any) -> PrecisionOptions:
    return PrecisionOptions(fp8="hybrid", fp8_recipe=recipe, **knobs)  # type: ignore[arg-type]


def problems(recipe: str, chip: Any) -> list[str]:
    return list(precision.chip_problems("policy", fp8(recipe), chip))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_is_one_of_megatrons(recipe: str) -> None:
    options = fp8(recipe, fp8_param=True)
    known = {kind: {f.name for f in fields(kind)} for kind in (TransformerConfig, OptimizerConfig)}
    assert precision.model_options(options).keys() <= known[TransformerConfig]
    assert precision.optimizer_options(options).keys() <= known[OptimizerConfig]
    assert precision.model_options(options).keys() == set(precision_rules.OWNED)
    OptimizerConfig(**precision.optimizer_options(options))
    DistributedDataParallelConfig(**precision.ddp_options(options))


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_types(dtype: Any, torch_dtype: torch.dtype) -> None:
    options = PrecisionOptions(dtype=dtype)
    for found in (precision.model_options(options), precision.optimizer_options(options)):
        assert found["params_dtype"] == torch_dtype
        assert (found["bf16"], found["fp16"]) == (dtype == "bf16", dtype == "fp16")
        assert found.get("fp8") is None
    assert precision.optimizer_options(options)["fp8_recipe"] is None


def test_loss_scaling_is_megatrons_own() -> None:
    knobs = {"initial_loss_scale": 8.0, "min_loss_scale": 2.0, "loss_scale_window": 5}
    found = precision.optimizer_options(PrecisionOptions(dtype="fp16", hysteresis=3, **knobs))
    assert found.items() >= (knobs | {"loss_scale": None, "hysteresis": 3}).items()


def test_weights_in_fp8_are_gathered_in_fp8_and_mxfp8_through_the_gradients_buffer() -> None:
    shared, gather = "reuse_grad_buf_for_mxfp8_param_ag", "fp8_param_gather"
    for recipe in RECIPES:
        options = fp8(recipe, fp8_param=True)
        assert precision.model_options(options)["fp8_param"]
        assert precision.optimizer_options(options)["fp8_recipe"] == recipe
        ddp = precision.ddp_options(options)
        assert ddp == {gather: True, shared: recipe == "mxfp8"}
        assert precision.optimizer_options(options)[shared] == ddp[shared]
    assert precision.ddp_options(fp8("mxfp8")) == {gather: False, shared: False}


# By Transformer Engine's support matrix:
# https://nvidia.github.io/TransformerEngine/support_matrix.html
CAN = {
    AMPERE: set(),
    ADA: {"delayed", "tensorwise"},
    HOPPER: {"delayed", "tensorwise", "blockwise"},
    BLACKWELL: {"delayed", "tensorwise", "blockwise", "mxfp8"},
    WORKSTATION: {"delayed", "tensorwise", "blockwise"},
    CPU: set(),
}


@pytest.mark.parametrize("chip", CAN, ids=lambda chip: chip.name)
def test_what_each_chip_can_do(chip: Any) -> None:
    assert {recipe for recipe in RECIPES if not problems(recipe, chip)} == CAN[chip]
    assert not list(precision.chip_problems("policy", PrecisionOptions(), chip))


def test_refusals_say_what_was_found_wanted_and_to_do() -> None:
    assert problems("mxfp8", HOPPER) == [
        "precision.policy.fp8_recipe: 'mxfp8' needs compute capability 10.0 or higher and below "
        "12.0, found 9.0 (NVIDIA H100), which can do delayed, tensorwise, blockwise; take another "
        "or remove precision.policy.fp8"
    ]
    assert "which can do no FP8 at all" in problems("delayed", AMPERE)[0]
    (found,) = problems("blockwise", replace(HOPPER, cuda=(12, 8)))
    assert "needs a torch built with CUDA 12.9 or newer, found 12.8" in found
    (found,) = problems("tensorwise", replace(HOPPER, transformer_engine=(2, 1)))
    assert "needs Transformer Engine 2.2 or newer, found 2.1" in found
    (found,) = problems("tensorwise", replace(HOPPER, transformer_engine=None))
    assert "Transformer Engine, which is not installed" in found
    (found,) = problems("delayed", CPU)
    assert found == "precision.policy.fp8: found a CPU, wanted a CUDA device; remove it"


def test_this_machine() -> None:
    here = Chip.here()
    assert (here.capability is None) == (not torch.cuda.is_available())
    assert here.name


class Layer(torch.nn.Module):
    """Has what Megatron's modules have: a config, shared or its own."""

    def __init__(self, config: Any, *inside: torch.nn.Module) -> None:
        super().__init__()
        self.config = config
        self.inside = torch.nn.ModuleList(inside)


def test_without_fp8_every_config_is_switched_off_and_on_again() -> None:
    shared, own = SimpleNamespace(fp8="hybrid"), SimpleNamespace(fp8="e4m3")
    plain, other = SimpleNamespace(fp8=None), SimpleNamespace(fp8="hybrid")
    model = Layer(shared, Layer(shared), Layer(own), Layer(plain), torch.nn.Linear(1, 1))
    with suppress(RuntimeError), precision.without_fp8(model, Layer(other)):
        assert other.fp8 is None
        assert (shared.fp8, own.fp8, plain.fp8) == (None, None, None)
        raise RuntimeError("an error inside")
    assert (shared.fp8, own.fp8, plain.fp8, other.fp8) == ("hybrid", "e4m3", None, "hybrid")


class RoundingEngine:
    """Log-probs are -1 for every token, and -1.25 for the second of a row while FP8 is on."""

    def __init__(self, options: PrecisionOptions) -> None:
        self.precision = options
        self.modules = (Layer(SimpleNamespace(fp8=options.fp8)),)
        self.scored: list[int] = []

    def next_rate(self) -> float:
        return 0.1

    def logprobs(self, sequences: list[TokenSequence]) -> torch.Tensor:
        self.scored.append(len(sequences))
        width = max(sequence.response_length for sequence in sequences)
        found = torch.full((len(sequences), width), -1.0)
        if self.modules[0].config.fp8 is not None and width > 1:
            found[:, 1] = -1.25
        return found

    def train_step(self, sequences: Any, rows: list[int], loss: Any) -> StepResult:
        assert self.modules[0].config.fp8 == self.precision.fp8, "training is not without FP8"
        found = self.logprobs(sequences)
        return StepResult(True, 0.5, 1.0, found, torch.zeros_like(found), 1.0)


RUN = RunConfig.model_validate(
    {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
)


def update(options: PrecisionOptions) -> tuple[dict[str, float], RoundingEngine]:
    """A PRM update of mini-batches of two: responses of 2 and 1 tokens, then of 3 and 3."""
    lengths = torch.tensor([2, 1, 3, 3])
    sequences = tuple(TokenSequence((5,) * (1 + n), 1) for n in lengths.tolist())
    mask = torch.arange(3) < lengths[:, None]
    batch = RolloutBatch(sequences, 2, mask, torch.zeros(4), torch.zeros(4, 3))
    engine = RoundingEngine(options)
    knobs = PrmSection(mini_batch_size=2)
    prm = MegatronPrm(engine, knobs, Guard(RUN, "prm"))  # type: ignore[arg-type]
    scored = ScoredBatch(batch, OldLogprobs.none(batch), torch.zeros(4, 3))
    return prm.update(scored).metrics, engine


def test_a_prm_in_fp8_reports_how_far_its_first_mini_batch_is_from_bf16() -> None:
    metrics, engine = update(fp8("tensorwise"))
    assert metrics["prm/fp8_logprob_error"] == pytest.approx(0.25 / 3)  # one of three tokens
    assert engine.scored == [2, 4, 4]
    assert engine.modules[0].config.fp8 == "hybrid"
    metrics, engine = update(PrecisionOptions())
    assert "prm/fp8_logprob_error" not in metrics
    assert engine.scored == [4, 4], "no forward is spent on a report without FP8"


def test_figures_of_loss_scaling() -> None:
    of = torch.zeros(1, 1)
    steps = [StepResult(ok, 0.0, 0.0, of, of, scale) for ok, scale in ((False, 8.0), (True, 4.0))]
    found = loss_scaling("prm", PrecisionOptions(dtype="fp16"), steps)
    assert found == {"prm/loss_scale": 4.0, "prm/skipped_steps": 1}
    assert loss_scaling("prm", PrecisionOptions(), steps) == {}
