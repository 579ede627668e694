"""Bytes of weights, gradients, masters and moments against the storages of real engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_ranks import fake_rank, megatron_options
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_prime.config import ParallelSizes, PolicySection, PrecisionOptions
from megatron_prime.models.architecture import build_model
from megatron_prime.models.precision import ddp_options
from megatron_prime.models.training import TrainableEngine, make_optimizer
from megatron_prime.planner.counts import Parameter, chunks
from megatron_prime.planner.states import Sharding, StateBytes, frozen_bytes, trained_bytes
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.weights.shape import ModelShape, padded


def tiny(tp: int = 1, tied: bool = False, family: str = "qwen2") -> ModelShape:
    return ModelShape(
        family=family,
        hidden_size=48,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=12,
        ffn_size=104,
        vocab_size=301,
        padded_vocab_size=padded(301, tp),
        max_positions=128,
        norm_eps=1e-5,
        rope_theta=1e4,
        qkv_bias=family == "qwen2",
        tied_embeddings=tied,
        qk_norm=family == "qwen3",
    )


def storages(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def stepped(ddp_chunks: list[Any], optimizer: Any) -> dict[str, int]:
    """Real bytes by kind, after a step on gradients of ones."""
    for chunk in ddp_chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(1.0)
    with megatron_calls():
        optimizer.step()
    parameters = [p for chunk in ddp_chunks for p in chunk.parameters()]
    stepped_tensors = [p for group in optimizer.param_groups for p in group["params"]]
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [state for one in inner for state in one.state.values()]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    masters = [t for t in stepped_tensors if t.untyped_storage().data_ptr() not in weights]
    return {
        "weights": storages(parameters),
        "gradients": storages([b.grad_data for chunk in ddp_chunks for b in chunk.buffers]),
        "masters": storages(masters),
        "moments": storages(moments),
    }


def kept(found: StateBytes) -> dict[str, int]:
    return {kind: n for kind, n in found.by_kind.items() if kind != "fp8_copies"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes", [ParallelSizes(), ParallelSizes(tp=2), ParallelSizes(tp=2, pp=2, vpp=2)]
)
def test_an_engine_on_a_cpu(dtype: Any, sizes: ParallelSizes) -> None:
    shape, precision = tiny(sizes.tp), PrecisionOptions(dtype=dtype)
    with fake_rank(sizes.replica - 1, sizes.replica, sizes):
        models = build_model(shape, precision, megatron_options(sizes))
        engine = TrainableEngine(models, shape, PolicySection(), 1.0, 10, precision)
        real = stepped(engine.chunks, engine.optimizer)
    held = chunks(shape, sizes, sizes.pp - 1)
    assert kept(trained_bytes(held, 8, precision, Sharding(distributed=False))) == real
    assert frozen_bytes(held, 8, precision).weights == real["weights"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "tied"),
    [
        (ParallelSizes(), False),
        (ParallelSizes(tp=2, cp=2), True),
        (ParallelSizes(pp=2), True),
        (ParallelSizes(pp=2, vpp=2), True),
    ],
)
def test_the_distributed_optimizer_on_every_rank(
    dtype: Any, sizes: ParallelSizes, tied: bool
) -> None:
    """The optimizer of GPU runs; its buffers and shards are the same on a CPU."""
    shape, precision = tiny(sizes.tp, tied, "qwen3"), PrecisionOptions(dtype=dtype)
    world_size = 3 * sizes.replica
    for rank in range(world_size):
        with fake_rank(rank, world_size, sizes):
            models = build_model(shape, precision, megatron_options(sizes))
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=True,
                **ddp_options(precision),
            )
            with megatron_calls():
                wrapped = [DistributedDataParallel(m.config, ddp, m) for m in models]
                optimizer = make_optimizer(wrapped, PolicySection(), precision, distributed=True)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            stage = parallel_state.get_pipeline_model_parallel_rank()
            sharding = Sharding(True, group.rank(), group.size(), 3, stage)
            real = stepped(wrapped, optimizer)
        found = trained_bytes(chunks(shape, sizes, stage), 8, precision, sharding)
        assert kept(found) == real, f"rank {rank}"


def test_large_models_are_cut_into_buckets() -> None:
    """By hand: 3 ranks, buckets of 40 million values and more, padded to 384."""
    layers = [Parameter(f"w{i}", 25_000_001, i) for i in range(3)]
    found = trained_bytes([layers], 3, PrecisionOptions(), Sharding(True, 2, 3, 3))
    first = 2 * 25_000_001 + 63  # the second starts at a multiple of 64
    padded_first = -(-first // 384) * 384
    second = -(-25_000_001 // 384) * 384
    assert found.gradients == 4 * (padded_first + second)
    padding = (padded_first - first) + (second - 25_000_001)  # all of it on the last rank
    assert found.masters == 4 * ((padded_first + second) // 3 - padding)
    assert found.moments == 2 * found.masters


def test_fp8_weights_are_counted_twice_and_first_and_last_layers_are_not() -> None:
    layers = [Parameter(f"w{i}", 1000, i) for i in range(4)] + [Parameter("norm", 10)]
    beside = PrecisionOptions(fp8="hybrid", first_last_layers_bf16=True)
    found = frozen_bytes([layers], 4, beside)
    assert (found.weights, found.fp8_copies) == (2 * 4010, 2 * 2000)
    only = PrecisionOptions(fp8="hybrid", fp8_param=True)
    found = trained_bytes([layers], 4, only, Sharding(distributed=False))
    assert (found.weights, found.fp8_copies) == (2 * 4000 + 2 * 10, 0)
    assert (found.masters, found.gradients) == (4 * 4010, 4 * 4010)
