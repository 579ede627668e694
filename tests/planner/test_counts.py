"""Parameters per rank against real GPTModels on the meta device, and against published totals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_rank, megatron_options
from megatron.core import parallel_state
from public_models import CONFIGS, PUBLISHED, shape_of

from megatron_prime.config import ConfigError, ParallelSizes, PrecisionOptions
from megatron_prime.models.architecture import build_model
from megatron_prime.planner.counts import chunks, count, engine_count
from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.placement import EngineLayout
from megatron_prime.weights.shape import ModelShape

LAYOUTS = [
    ("Llama-3-8B", ParallelSizes()),
    ("Llama-3-8B", ParallelSizes(tp=2, pp=2, cp=2)),
    ("Llama-3-8B", ParallelSizes(tp=8, pp=4, vpp=2)),
    ("Llama-3-70B", ParallelSizes(tp=8, pp=8)),
    ("Llama-3-70B", ParallelSizes(tp=4, pp=4, vpp=5)),
    ("Qwen2.5-7B", ParallelSizes(tp=4)),
    ("Qwen2.5-7B", ParallelSizes(tp=2, pp=4, vpp=7)),
    ("Qwen2.5-32B", ParallelSizes(tp=4, pp=4)),
    ("Qwen2.5-72B", ParallelSizes(tp=8, pp=4)),
    ("Qwen2.5-72B", ParallelSizes(tp=2, pp=8, vpp=2)),
    ("Qwen3-8B", ParallelSizes(tp=2, pp=2)),
    ("Qwen3-8B", ParallelSizes(tp=8)),
    ("Qwen3-32B", ParallelSizes(tp=8, pp=2, vpp=4)),
    ("Qwen3-32B", ParallelSizes(tp=4, pp=8)),
    ("Qwen2.5-0.5B", ParallelSizes(tp=2)),
    ("Qwen2.5-0.5B", ParallelSizes(tp=2, pp=4, vpp=2)),
]


def real_chunks(shape: ModelShape, sizes: ParallelSizes, monkeypatch: Any) -> list[list[int]]:
    """What `build_model` makes on this rank, without memory for it."""
    options = megatron_options(sizes, perform_initialization=False)
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        models = build_model(shape, PrecisionOptions(), options)
    return [[parameter.numel() for parameter in model.parameters()] for model in models]


@pytest.mark.parametrize(("name", "sizes"), LAYOUTS)
def test_every_rank_holds_what_megatron_builds(
    name: str, sizes: ParallelSizes, tmp_path: Path, monkeypatch: Any
) -> None:
    assert_equal_on_every_rank(shape_of(tmp_path, name, sizes.tp), sizes, monkeypatch)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Llama-3-8B", ParallelSizes(tp=2)),
        ("Qwen2.5-0.5B", ParallelSizes(pp=2)),  # tied, but a critic is not
        ("Qwen2.5-0.5B", ParallelSizes(tp=2, pp=4, vpp=2)),
    ],
)
def test_a_critic_has_a_value_head_on_its_last_stage(
    name: str, sizes: ParallelSizes, tmp_path: Path, monkeypatch: Any
) -> None:
    shape = shape_of(tmp_path, name, sizes.tp).as_critic()
    assert_equal_on_every_rank(shape, sizes, monkeypatch)
    assert chunks(shape, sizes, sizes.pp - 1)[-1][-1].numel == shape.hidden_size


def assert_equal_on_every_rank(shape: ModelShape, sizes: ParallelSizes, monkeypatch: Any) -> None:
    world_size = (
        2 * sizes.replica
    )  # two data-parallel replicas; the second holds what the first does
    for rank in range(world_size):
        with fake_rank(rank, world_size, sizes):
            if parallel_state.get_data_parallel_rank() > 0:
                continue
            stage = parallel_state.get_pipeline_model_parallel_rank()
            real = real_chunks(shape, sizes, monkeypatch)
        found = [[p.numel for p in chunk] for chunk in chunks(shape, sizes, stage)]
        assert found == real, f"rank {rank}"


@pytest.mark.parametrize("name", CONFIGS)
def test_totals_are_the_published_ones(name: str, tmp_path: Path) -> None:
    assert count(shape_of(tmp_path, name), ParallelSizes(), 0) == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_an_engine_rank_holds_what_the_reshard_sends(name: str, tp: int, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, name)
    if shape.num_heads % tp:
        return
    found = engine_count(shape, tp)
    matrices = others = 0
    for parameter in EngineLayout(tp, tp).parameters(shape, 0):
        numel = torch.Size(parameter.size).numel()
        is_matrix = len(parameter.size) == 2 and "embed" not in parameter.name
        if is_matrix and "lm_head" not in parameter.name:
            matrices += numel
        else:
            others += numel
    assert (found.matrices, found.others) == (matrices, others)
    if tp == 1:
        assert found.all == sum(torch.Size(size).numel() for size in hf_shapes(shape).values())


def test_what_can_not_be_cut_is_refused_by_knob(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "Qwen2.5-7B")
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size: 8 does not divide .*heads"):
        chunks(shape, ParallelSizes(tp=8), 0)
    with pytest.raises(ConfigError, match=r"8 stages .* do not divide the model's 28 layers"):
        chunks(shape, ParallelSizes(pp=4, vpp=2), 0)
