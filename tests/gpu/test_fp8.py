"""FP8 on a real chip: each recipe that it supports, against bf16 and an emulation on the CPU.

The bounds. Log-probs may move by at most three times what emulated FP8 products move them, and by
at least a third of it, or the products were not in FP8 at all; switched off, by a tenth. Thirty
steps must lower the loss by at least nine tenths of what they do in bf16. FP8 weights may be off by
half a step of E4M3, 1/16 of their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import emulated_fp8
import pytest
import torch

from megatron_prime.config import (
    ParallelSizes,
    PolicySection,
    PrecisionOptions,
    PrmSection,
    RunConfig,
)
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import OldLogprobs, RolloutBatch, ScoredBatch, TokenSequence

before_megatron_import()

from megatron.core.fp8_utils import is_float8tensor  # noqa: E402

from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.engine import Engine, Forward  # noqa: E402
from megatron_prime.models.guard import Guard  # noqa: E402
from megatron_prime.models.precision import Chip, chip_problems, without_fp8  # noqa: E402
from megatron_prime.models.prm import MegatronPrm  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import Rendezvous  # noqa: E402
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402
from megatron_prime.weights.safetensors_io import HfCheckpoint  # noqa: E402

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]
RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]
ROWS, STEPS = 16, 30
STILL, LEARNING = 1e-12, 1e-3  # learning rates


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    emulated_fp8.make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    distributed.initialize(Rendezvous(), ParallelSizes(), 0, 120)
    yield
    distributed.destroy()


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    """Ragged on purpose: their tokens are multiples of nothing."""
    generator = torch.Generator().manual_seed(1)
    vocab = emulated_fp8.SHAPE["vocab_size"]
    rows = [torch.randint(0, vocab, (8 + 5 * row,), generator=generator) for row in range(ROWS)]
    return [TokenSequence(tuple(row.tolist()), 4) for row in rows]


@pytest.fixture(scope="module")
def emulated_error(hf_dir: Path, sequences: list[TokenSequence]) -> float:
    """Mean distance of log-probs with and without emulated FP8 products, in nats."""
    exact = emulated_fp8.logprobs(hf_dir, sequences, in_fp8=False)
    rough = emulated_fp8.logprobs(hf_dir, sequences, in_fp8=True)
    return float((exact - rough).abs().mean())


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    """The recipe, or a skip with the reason why this chip can't have it."""
    options = PrecisionOptions(fp8="hybrid", fp8_recipe=request.param)
    if problems := list(chip_problems("policy", options, Chip.here())):
        pytest.skip(problems[0])
    return str(request.param)


RUN = RunConfig.model_validate(
    {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
)


def trainable(hf_dir: Path, lr: float, **options: Any) -> TrainableEngine:
    precision = PrecisionOptions(**options)
    knobs = PolicySection(lr=lr, weight_decay=0.0, micro_batch_tokens=1024)
    shape = ModelShape.from_hf(hf_dir)
    model = build_model(shape, precision, {})
    load_hf(model, hf_dir, shape)
    return TrainableEngine(model, shape, knobs, 1.0, STEPS, precision)


def steps(engine: TrainableEngine, sequences: list[TokenSequence], count: int) -> list[float]:
    """Losses of `count` steps on the mean negative log-prob of the responses."""
    lengths = torch.tensor([sequence.response_length for sequence in sequences])

    def loss(forward: Forward) -> torch.Tensor:
        width = torch.arange(forward.logprobs.shape[1], device=engine.grid.device)
        inside = width < lengths.to(engine.grid.device)[forward.rows][:, None]
        return -torch.where(inside, forward.logprobs, 0.0).sum() / int(lengths.sum())

    found = []
    for _ in range(count):
        engine.next_rate()
        found.append(engine.train_step(sequences, range(len(sequences)), loss).loss)
    return found


def flat(engine: Engine, sequences: list[TokenSequence]) -> torch.Tensor:
    """Log-probs of all response tokens, one row after the other."""
    found = engine.logprobs(sequences)
    return torch.cat([row[: s.response_length] for row, s in zip(found, sequences, strict=True)])


def test_rounding_of_the_emulation() -> None:
    """By hand: E4M3 keeps four significant bits, so 448 / 16 = 28 is a step of 2 apart from 30."""
    values = torch.tensor([448.0, 29.0, -27.0, 0.0])
    assert emulated_fp8.rounded(values).tolist() == [448.0, 28.0, -28.0, 0.0]
    assert emulated_fp8.rounded(values / 7).tolist() == pytest.approx([64.0, 4.0, -4.0, 0.0])


def test_the_emulation_moves_log_probs(emulated_error: float) -> None:
    assert 0.01 < emulated_error < 0.2, "the bounds of the tests on a chip hang on it"


@pytest.mark.usefixtures("session")
class TestOnAChip:
    """Each recipe, trained and scored by the project's own engine."""

    pytestmark = gpu

    def test_log_probs_are_as_far_from_bf16_as_fp8_is(
        self, recipe: str, hf_dir: Path, sequences: list[TokenSequence], emulated_error: float
    ) -> None:
        bf16 = flat(trainable(hf_dir, STILL), sequences)
        engine = trainable(hf_dir, STILL, fp8="hybrid", fp8_recipe=recipe)
        steps(engine, sequences, 2)  # without moving; delayed scales come from training steps
        error = float((flat(engine, sequences) - bf16).abs().mean())
        assert emulated_error / 3 < error < 3 * emulated_error
        with without_fp8(*engine.modules):
            off = float((flat(engine, sequences) - bf16).abs().mean())
        assert off < error / 10
        again = float((flat(engine, sequences) - bf16).abs().mean())
        assert again == pytest.approx(error, rel=0.05), "FP8 is on again"

    @pytest.mark.parametrize("fp8_param", [False, True])
    @pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
    def test_it_learns_like_bf16(
        self, recipe: str, fp8: str, fp8_param: bool, hf_dir: Path, sequences: list[TokenSequence]
    ) -> None:
        if recipe == "delayed" and fp8_param:
            pytest.skip("delayed scaling has no scale when weights are loaded")
        plain = steps(trainable(hf_dir, LEARNING), sequences, STEPS)
        engine = trainable(hf_dir, LEARNING, fp8=fp8, fp8_recipe=recipe, fp8_param=fp8_param)
        found = steps(engine, sequences, STEPS)
        assert plain[0] - plain[-1] > 0.5, "the comparison means nothing if nothing was learnt"
        assert found[0] - found[-1] > 0.9 * (plain[0] - plain[-1])

    def test_first_and_last_layers_in_bf16(
        self, recipe: str, hf_dir: Path, sequences: list[TokenSequence]
    ) -> None:
        if recipe == "delayed":
            pytest.skip("delayed scaling knows no layers in bf16")
        bf16 = flat(trainable(hf_dir, STILL), sequences)
        apart = []
        for layers in (0, 1, 2):  # of 4, at either end
            options = {"num_layers_at_start_in_bf16": layers, "num_layers_at_end_in_bf16": layers}
            engine = trainable(
                hf_dir,
                STILL,
                fp8="hybrid",
                fp8_recipe=recipe,
                first_last_layers_bf16=True,
                **options,
            )
            apart.append(float((flat(engine, sequences) - bf16).abs().mean()))
        assert apart[0] > apart[1] > 10 * apart[2]

    def test_fp8_weights_go_in_and_out(self, recipe: str, hf_dir: Path) -> None:
        """What is gathered is what was loaded, rounded; the masters are what was loaded."""
        if recipe == "delayed":
            pytest.skip("delayed scaling has no scale when weights are loaded")
        truth = {name: tensor.cuda() for name, tensor in HfCheckpoint(hf_dir).tensors()}
        engine = trainable(hf_dir, STILL, fp8="hybrid", fp8_recipe=recipe, fp8_param=True)
        kept = sum(is_float8tensor(parameter) for parameter in engine.modules[0].parameters())
        assert kept == 4 * emulated_fp8.SHAPE["num_hidden_layers"]
        found = dict(gather_hf_tensors(engine.modules, engine.shape))
        assert found.keys() == truth.keys()
        rounded = 0
        for name, tensor in found.items():
            assert tensor.dtype == torch.bfloat16
            apart = (tensor.float() - truth[name]).abs()
            smallest = float(truth[name].abs().max()) / 448 / 2**9  # half of E4M3's last step
            assert bool((apart <= truth[name].abs() / 16 + smallest).all()), name
            rounded += bool(apart.any())
        assert rounded == 7 * emulated_fp8.SHAPE["num_hidden_layers"]  # q k v o gate up down
        masters = {
            name: parameter.main_param
            for name, parameter in engine.modules[0].named_parameters()
            if name.endswith("linear_proj.weight")
        }
        for layer in range(emulated_fp8.SHAPE["num_hidden_layers"]):
            master = masters[f"decoder.layers.{layer}.self_attention.linear_proj.weight"]
            wanted = truth[f"model.layers.{layer}.self_attn.o_proj.weight"]
            assert torch.equal(master.view(wanted.shape), wanted.float())

    def test_a_prm_in_fp8_reports_its_error(
        self, recipe: str, hf_dir: Path, sequences: list[TokenSequence], emulated_error: float
    ) -> None:
        lengths = torch.tensor([sequence.response_length for sequence in sequences])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        batch = RolloutBatch(tuple(sequences), 4, mask, torch.rand(ROWS), torch.zeros(mask.shape))
        engine = trainable(hf_dir, STILL, fp8="hybrid", fp8_recipe=recipe)
        steps(engine, sequences, 2)
        prm = MegatronPrm(engine, PrmSection(mini_batch_size=8), Guard(RUN, "prm"))
        ref = trainable(hf_dir, STILL).logprobs(sequences)
        metrics = prm.update(ScoredBatch(batch, OldLogprobs.none(batch), ref)).metrics
        assert emulated_error / 3 < metrics["prm/fp8_logprob_error"] < 3 * emulated_error
