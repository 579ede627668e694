"""Activations against what autograd keeps of a real forward, and a real step's most bytes."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from fake_ranks import fake_rank, megatron_options
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity, profile

from megatron_prime.config import ParallelSizes, PolicySection, PrecisionOptions
from megatron_prime.models.architecture import build_model
from megatron_prime.models.engine import Forward
from megatron_prime.models.packed_attention import Pack
from megatron_prime.models.training import TrainableEngine
from megatron_prime.planner.activations import Computation, activations, chunks_in_flight
from megatron_prime.types import TokenSequence
from megatron_prime.weights.shape import ModelShape, padded

pytestmark = pytest.mark.long

TOKENS = 256


def shape_of(tp: int, family: str = "llama") -> ModelShape:
    return ModelShape(
        family=family,
        hidden_size=128,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        ffn_size=416,
        vocab_size=1000,
        padded_vocab_size=padded(1000, tp),
        max_positions=512,
        norm_eps=1e-5,
        rope_theta=1e4,
        qkv_bias=False,
        tied_embeddings=False,
        qk_norm=family == "qwen3",
    )


def saved_bytes(models: list[Any], lengths: tuple[int, ...], sizes: ParallelSizes) -> int:
    """Storages that autograd keeps after a forward of each chunk, parameters aside."""
    kept: dict[int, Any] = {}
    own = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    tokens = sum(lengths) // sizes.cp
    for model in models:
        pack = Pack.of(lengths, 0, sizes.cp, torch.device("cpu"))
        pack.wanted = torch.arange(tokens)
        if not model.pre_process:
            share = sizes.tp if model.config.sequence_parallel else 1
            received = torch.zeros(tokens // share, 1, 128, dtype=model.config.params_dtype)
            model.set_input_tensor(received.requires_grad_())
            kept[received.untyped_storage().data_ptr()] = received.untyped_storage()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(
                input_ids=torch.zeros(1, tokens, dtype=torch.int64),
                position_ids=torch.zeros(1, tokens, dtype=torch.int64),
                attention_mask=None,
                packed_seq_params=pack,
            )
    return sum(storage.nbytes() for storage in kept.values())


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 3}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
CASES: list[tuple[ParallelSizes, str, dict[str, Any], tuple[int, ...]]] = [
    (ParallelSizes(), "llama", {}, (256,)),
    (ParallelSizes(), "llama", {}, (110, 96, 50)),
    (ParallelSizes(), "qwen3", {}, (256,)),
    (ParallelSizes(tp=2), "llama", {}, (256,)),
    (ParallelSizes(tp=2), "llama", {"sequence_parallel": False}, (256,)),
    (ParallelSizes(tp=4), "qwen3", {}, (256,)),
    (ParallelSizes(cp=2), "llama", {}, (64,) * 8),
    (ParallelSizes(pp=2), "llama", {}, (256,)),
    (ParallelSizes(tp=2, pp=2, vpp=2), "llama", {}, (256,)),
    (ParallelSizes(), "llama", FULL, (256,)),
    (ParallelSizes(tp=2), "llama", BLOCK, (256,)),
    (ParallelSizes(), "llama", MLP, (256,)),
    (ParallelSizes(), "llama", {"recompute_granularity": "selective"}, (256,)),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("sizes", "family", "options", "lengths"), CASES)
def test_what_autograd_keeps(
    sizes: ParallelSizes, family: str, options: Any, lengths: tuple[int, ...], dtype: Any
) -> None:
    compare_what_autograd_keeps(shape_of(sizes.tp, family), sizes, options, lengths, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (ParallelSizes(), {}),
        (ParallelSizes(tp=2), {}),
        (ParallelSizes(tp=2), {"sequence_parallel": False}),
        (ParallelSizes(pp=2), {}),
    ],
)
def test_what_autograd_keeps_of_a_critic(sizes: ParallelSizes, options: Any, dtype: Any) -> None:
    shape = shape_of(sizes.tp).as_critic()
    compare_what_autograd_keeps(shape, sizes, options, (256,), dtype)


def compare_what_autograd_keeps(
    shape: ModelShape, sizes: ParallelSizes, options: Any, lengths: tuple[int, ...], dtype: Any
) -> None:
    precision, megatron = PrecisionOptions(dtype=dtype), megatron_options(sizes, **options)
    for rank in (0, sizes.replica - 1):
        with fake_rank(rank, sizes.replica, sizes):
            stage = parallel_state.get_pipeline_model_parallel_rank()
            real = saved_bytes(build_model(shape, precision, megatron), lengths, sizes)
        how = Computation.of(megatron, sizes, stage, precision, 1.0, on_gpu=False)
        found = activations(shape, how, TOKENS, TOKENS, micro_batches=1)
        assert found.saved == pytest.approx(real, rel=0.05), f"rank {rank}"


def most_bytes(work: Any) -> int:
    """Most bytes allocated at once inside, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert changes
    return max(accumulate(nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])))


def mean_logprob(forward: Forward) -> torch.Tensor:
    return forward.logprobs.mean()


WIDE = {"vocab_size": 8000, "padded_vocab_size": 8000}  # logits decide
CRITIC = {"value_head": True}
DEEP = {"num_layers": 8, "vocab_size": 100, "padded_vocab_size": 112}  # layers decide


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tp", "changes", "temperature", "options"),
    [
        (1, {}, 1.0, {}),
        (1, WIDE, 1.0, {}),
        (1, WIDE, 0.7, {}),
        (1, DEEP, 1.0, {}),
        (1, DEEP, 1.0, FULL),
        (2, WIDE, 1.0, {}),
        (2, WIDE, 1.0, {"sequence_parallel": False}),
        (1, CRITIC, 1.0, {}),
        (1, DEEP | CRITIC, 1.0, FULL),
        (2, CRITIC, 1.0, {}),
        (2, CRITIC, 1.0, {"sequence_parallel": False}),
    ],
)
def test_the_most_bytes_of_a_real_step(
    tp: int, changes: Any, temperature: float, options: Any, dtype: Any
) -> None:
    shape, precision = replace(shape_of(tp), **changes), PrecisionOptions(dtype=dtype)
    sizes, knobs = ParallelSizes(tp=tp), PolicySection(micro_batch_tokens=2 * TOKENS)
    megatron = megatron_options(sizes, **options)
    rows = [TokenSequence(tuple(i % 90 for i in range(TOKENS // 2)), 1)] * 4

    with fake_rank(0, tp, sizes):
        models = build_model(shape, precision, megatron)
        engine = TrainableEngine(models, shape, knobs, temperature, 10, precision)
        engine.train_step(rows, range(4), mean_logprob)  # what is allocated once
        training = most_bytes(lambda: engine._schedule(rows, range(4), mean_logprob))
        scoring = most_bytes(lambda: engine.logprobs(rows))
        checking = most_bytes(engine._gradients_are_finite)
    how = Computation.of(megatron, sizes, 0, precision, temperature, on_gpu=False)
    found = activations(shape, how, 2 * TOKENS, 2 * TOKENS - 4, micro_batches=1)
    assert found.training == pytest.approx(training, rel=0.15)
    assert found.scoring == pytest.approx(scoring, rel=0.15)
    assert checking < 1000, "looking for gradients that are not finite needs no memory"


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        (ParallelSizes(pp=4), "bf16"),
        (ParallelSizes(pp=2, vpp=2), "bf16"),
        (ParallelSizes(tp=2, pp=2, vpp=4), "fp32"),
    ],
)
def test_the_most_bytes_of_each_stage_of_a_pipeline(sizes: ParallelSizes, dtype: Any) -> None:
    """Megatron's schedules with eight micro-batches; what fake neighbours send is not looked at."""
    shape, precision = replace(shape_of(sizes.tp), **DEEP), PrecisionOptions(dtype=dtype)
    megatron, knobs = megatron_options(sizes), PolicySection(micro_batch_tokens=TOKENS)
    rows = [TokenSequence(tuple(i % 90 for i in range(TOKENS)), 1)] * 8
    for stage in range(sizes.pp):
        with fake_rank(stage * sizes.tp, sizes.replica, sizes):
            models = build_model(shape, precision, megatron)
            engine = TrainableEngine(models, shape, knobs, 1.0, 10, precision)
            engine._schedule(rows, range(8), mean_logprob)  # what is allocated once
            training = most_bytes(lambda: engine._schedule(rows, range(8), mean_logprob))  # noqa: B023
            with torch.no_grad():
                scoring = most_bytes(lambda: engine._schedule(rows, range(8), None))  # noqa: B023
        how = Computation.of(megatron, sizes, stage, precision, 1.0, on_gpu=False)
        found = activations(shape, how, TOKENS, TOKENS - 1, micro_batches=8)
        assert found.training == pytest.approx(training, rel=0.15), f"stage {stage}"
        assert found.scoring == pytest.approx(scoring, rel=0.15), f"stage {stage}"


def test_micro_batches_in_flight() -> None:
    """By hand, from the warm-up of Megatron's schedules."""
    plain, virtual = ParallelSizes(pp=4), ParallelSizes(pp=4, vpp=3)
    assert [chunks_in_flight(plain, stage, 100) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(virtual, stage, 100) for stage in range(4)] == [15, 13, 11, 9]
    assert chunks_in_flight(plain, 0, 2) == 2
    assert chunks_in_flight(virtual, 0, 4) == 12
