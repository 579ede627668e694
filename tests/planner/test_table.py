"""Which table a run gets, by hand for Llama-3-8B on eight ranks of TP 8."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_runs import run_config

from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.residency import NEEDED, PHASES, RESIDENT
from megatron_prime.planner.table import plan_of, planned_tokens

TP8 = {"tensor_model_parallel_size": 8, "sequence_parallel": True}


def config_of(folder: Path, **tables):
    engine = {"engine": "sglang", "tensor_parallel_size": 8}
    return run_config(folder, "Llama-3-8B", megatron=TP8, rollout=engine, **tables)


@pytest.mark.parametrize(("offload", "table"), [("never", RESIDENT), ("always", NEEDED)])
def test_what_was_asked_for(tmp_path: Path, offload: str, table) -> None:
    config = config_of(tmp_path, memory={"offload": offload}, sglang={"max_total_tokens": 4096})
    for machine in (None, Machine(), Machine(device_bytes=GIB)):
        assert plan_of(config, 8, machine)[0] is table


def test_without_a_limit_everything_stays(tmp_path: Path) -> None:
    table, plan = plan_of(config_of(tmp_path), 8, None)
    assert table is RESIDENT
    assert plan.fits


def test_what_fits_stays_and_what_does_not_leaves(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    away = {}
    for gib in (40, 50, 60, 80):
        table, plan = plan_of(config, 8, Machine(device_bytes=gib * GIB))
        kept = plan.ranks[0].kept
        away[gib] = sum(
            n for name, n in kept.items() if any(name not in table[phase] for phase in PHASES)
        )
        assert plan.fits
        assert plan.phases == make_plan(config, 8, plan.machine, table, one_per_stage=True).phases
    assert away[40] > away[60] > 0
    assert away[80] == 0
    table, plan = plan_of(config, 8, Machine(device_bytes=24 * GIB))
    assert not plan.fits
    held = {name for name, n in plan.ranks[0].kept.items() if n}
    assert all(table[phase] & held == NEEDED[phase] & held for phase in PHASES)


def test_weights_in_fp8_alone_stay(tmp_path: Path) -> None:
    fp8 = {"policy": {"fp8": "hybrid", "fp8_param": True}}
    config = config_of(tmp_path, precision=fp8, sglang={"max_total_tokens": 4096})
    assert plan_of(config, 8, Machine(device_bytes=30 * GIB))[0] is RESIDENT


PER_TOKEN = 2 * 32 * 1 * 128 * 2  # keys and values, 32 layers, one of 8 heads, bf16


def test_servers_get_what_was_planned(tmp_path: Path) -> None:
    """0.4 of what is free, less the weights: on an emptied device, and beside all that stays."""
    for offload in ("auto", "always", "never"):
        config = config_of(tmp_path, memory={"offload": offload})
        for table, plan in (plan_of(config, 8, Machine()), plan_of(config, 8, Machine(70 * GIB))):
            kept = plan.ranks[0].kept
            tokens = planned_tokens(config, plan)
            assert tokens * PER_TOKEN == kept["engine.kv_cache"]
            models = sum(n for name, n in kept.items() if name.startswith(("po", "prm", "ref")))
            others = models if table is RESIDENT else 0
            free = plan.machine.device_bytes - 6 * GIB - others - kept["sync.buffers"]
            assert tokens == int(0.4 * free - kept["engine.weights"]) // PER_TOKEN


def test_asked_for_tokens_are_planned(tmp_path: Path) -> None:
    config = config_of(tmp_path, sglang={"max_total_tokens": 12345})
    assert planned_tokens(config, plan_of(config, 8, Machine())[1]) == 12345


def test_all_servers_get_the_same_however_unlike_the_stages(tmp_path: Path) -> None:
    """The first and last of four stages hold embeddings; all make do with what these leave."""
    megatron = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}
    config = run_config(
        tmp_path,
        "Llama-3-8B",
        megatron=megatron,
        rollout={"engine": "sglang", "tensor_parallel_size": 8},
        memory={"offload": "never"},
    )
    table, plan = plan_of(config, 16, Machine())
    every = make_plan(config, 16, Machine(), table)
    assert len({rank.kept["engine.kv_cache"] for rank in (*plan.ranks, *every.ranks)}) == 1
    most = max(
        sum(n for name, n in rank.kept.items() if not name.startswith(("engine", "sync")))
        for rank in every.ranks
    )
    kept = every.ranks[0].kept
    free = 74 * GIB - most - kept["sync.buffers"]
    assert planned_tokens(config, plan) == int(0.4 * free - kept["engine.weights"]) // PER_TOKEN
