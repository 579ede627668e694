"""Which table a run gets, by hand for Llama-3-8B on eight ranks of TP 8."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_runs import run_config

from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.residency import NEEDED, PHASES, RESIDENT
from megatron_prime.planner.table import plan_of

TP8 = {"tensor_model_parallel_size": 8, "sequence_parallel": True}


def config_of(folder: Path, **tables):
    engine = {"engine": "sglang", "tensor_parallel_size": 8}
    return run_config(folder, "Llama-3-8B", megatron=TP8, rollout=engine, **tables)


@pytest.mark.parametrize(("offload", "table"), [("never", RESIDENT), ("always", NEEDED)])
def test_what_was_asked_for(tmp_path: Path, offload: str, table) -> None:
    config = config_of(tmp_path, memory={"offload": offload})
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
    config = config_of(tmp_path, precision=fp8)
    assert plan_of(config, 8, Machine(device_bytes=30 * GIB))[0] is RESIDENT
