"""What a run needs, against numbers that are counted here once more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "planner"))

from planned_runs import SGLANG_8B, TINY, run_config

from megatron_prime.config import RunConfig
from megatron_prime.planner.memory import GIB
from megatron_prime.preflight.needs import checkpoint_bytes, checkpoints_to_come, needs_of


def tiny_parameters() -> int:
    """Of the tiny model: embedding, output layer, and per layer attention, feed-forward, norms."""
    h, f, vocabulary = TINY["hidden_size"], TINY["intermediate_size"], 304  # 301, padded to 8
    head = h // TINY["num_attention_heads"]
    kv = TINY["num_key_value_heads"] * head
    layer = h * (h + 2 * kv) + (h + 2 * kv) + h * h + 3 * h * f + 2 * h
    return 2 * vocabulary * h + TINY["num_hidden_layers"] * layer + h


def test_a_checkpoint_of_one_rank(tmp_path: Path) -> None:
    """fp32 on a CPU: a weight and two moments; of bf16, a master as well."""
    for dtype, value in {"fp32": 12, "bf16": 14}.items():
        precision = {name: {"dtype": dtype} for name in ("policy", "prm", "reference")}
        needs = needs_of(run_config(tmp_path, precision=precision), 1, 1, None, 0)
        assert needs.checkpoint == 2 * value * tiny_parameters()
        assert needs.export == tiny_parameters() * (4 if dtype == "fp32" else 2)


def test_layouts_save_as_much_but_for_norms(tmp_path: Path) -> None:
    """What tensor-parallel ranks have in common is counted once for each of them."""
    alone = needs_of(run_config(tmp_path), 1, 1, None, 0).checkpoint
    assert alone is not None
    for tp, pp, ranks in ((2, 2, 4), (1, 2, 4), (2, 1, 8)):
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        found = needs_of(run_config(tmp_path, megatron=sizes), ranks, ranks, None, 0).checkpoint
        assert found is not None
        assert alone <= found < 1.02 * alone


def test_8b_on_a_node_of_gpus(tmp_path: Path) -> None:
    """28 bytes per parameter, whatever the distributed optimizer spreads; padding is little."""
    config = run_config(tmp_path, "Llama-3-8B", **SGLANG_8B)
    needs = needs_of(config, 8, 8, 80 * GIB, 0)
    assert needs.checkpoint == pytest.approx(28 * 8.03e9, rel=0.005)
    assert needs.device is not None
    assert 40 * GIB < needs.device <= 74 * GIB  # it fits, beside the reserve
    assert needs.shares_gpus
    assert needs.host is not None


def test_what_the_optimizer_spreads_is_added_up() -> None:
    stages: list[Any] = [
        {"policy.weights": 10, "policy.masters": 3, "policy.moments": 6, "engine.weights": 99},
        {"policy.weights": 20, "prm.weights": 5, "prm.gradients": 99, "prm.moments": 1},
    ]
    assert checkpoint_bytes(stages, 1, 1) == 45
    assert checkpoint_bytes(stages, 2, 4) == 2 * (35 + 4 * 10)


@pytest.mark.parametrize(
    ("steps", "every", "keep", "there", "wanted"),
    [
        (100, 10, 2, 0, 3),
        (100, 10, 2, 2, 1),
        (100, 10, 2, 9, 1),  # one is always written
        (10, 10, 2, 0, 1),
        (11, 10, 2, 0, 2),
        (100, 0, 2, 0, 1),
        (100, 10, 0, 4, 6),
    ],
)
def test_checkpoints_at_once(
    steps: int, every: int, keep: int, there: int, wanted: int, tmp_path: Path
) -> None:
    given = {"run": {"folder": tmp_path, "steps": steps}, "model": {"hf": tmp_path}}
    knobs = {"data": {"train": tmp_path}, "checkpoint": {"every": every, "keep": keep}}
    config = RunConfig.model_validate({**given, **knobs})
    assert checkpoints_to_come(config, there) == wanted


def test_servers_on_a_cpu_hand_weights_over_in_shared_memory(tmp_path: Path) -> None:
    config = run_config(tmp_path, rollout={"engine": "sglang", "sync_bucket_mib": 8.0})
    needs = needs_of(config, 4, 4, None, 0)
    assert needs.shm == 4 * 2 * 8 * 2**20
    assert needs.host is not None
    assert needs.host < GIB, "a cache without a limit has no useful size"
    assert needs_of(run_config(tmp_path), 4, 4, None, 0).shm == 0


def test_without_a_plan_the_rest_is_known(tmp_path: Path) -> None:
    uneven = {"num_layers_in_first_pipeline_stage": 1, "pipeline_model_parallel_size": 2}
    needs = needs_of(run_config(tmp_path, megatron=uneven), 2, 2, None, 0)
    assert "num_layers_in_first_pipeline_stage" in needs.no_plan
    assert (needs.device, needs.host, needs.checkpoint) == (None, None, None)
    assert needs.open_files == 1024 + 2 * 8
