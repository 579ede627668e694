"""Runs that can't fit are refused, with the table and what would help; others are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from planned_runs import SGLANG_8B, run_config

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.door import check_fits, check_host, machine_of, plan_or_advice
from megatron_prime.planner.engine_bytes import NoRoomForServers
from megatron_prime.planner.memory import GIB, Machine
from megatron_prime.planner.table import plan_of


def run_8b(folder: Path, tokens: int | None = None, **memory: Any) -> RunConfig:
    sglang = {} if tokens is None else {"max_total_tokens": tokens}
    return run_config(folder, "Llama-3-8B", memory=memory, sglang=sglang, **SGLANG_8B)


def test_the_machine(tmp_path: Path) -> None:
    config = run_8b(tmp_path)
    assert machine_of(config, None, on_gpu=False) is None
    assert machine_of(config, 80 * GIB, on_gpu=True) == Machine(80 * GIB, 6 * GIB, True)
    config = run_8b(tmp_path, device_gib=2.0, reserve_gib=1.0)
    assert machine_of(config, None, on_gpu=False) == Machine(2 * GIB, 0, False)
    assert machine_of(config, 80 * GIB, on_gpu=True) == Machine(2 * GIB, GIB, True)


def test_a_run_that_fits_begins(tmp_path: Path) -> None:
    check_fits(run_8b(tmp_path), 8, 80 * GIB, on_gpu=True)
    check_fits(run_8b(tmp_path, offload="never"), 8, 141 * GIB, on_gpu=True)


def test_one_that_does_not_is_refused_with_what_helps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_fits(run_8b(tmp_path, 4096, offload="never"), 8, 80 * GIB, on_gpu=True)
    message = str(refusal.value)
    assert "DOES NOT FIT: 114" in message
    assert "of 80 GiB" in message
    assert 'memory.offload = "auto"' in message
    assert "memory.start_anyway = true" in message
    assert "update_policy" in message
    assert len(message.splitlines()) < 20


def test_servers_without_room_are_refused_with_what_helps(tmp_path: Path) -> None:
    """Under `never` the models leave 0 GiB; what helps is planned."""
    with pytest.raises(ConfigError, match=r"mem_fraction_static: found 0\.4 of the") as refusal:
        check_fits(run_8b(tmp_path, offload="never"), 8, 80 * GIB, on_gpu=True)
    message = str(refusal.value)
    assert re.search(r'memory\.offload = "auto": [\d.]+ GiB, fits', message)
    assert "memory.start_anyway = true" in message
    with pytest.raises(NoRoomForServers, match=r"13\.5 GiB .* it to 0\.58 or more"):
        plan_or_advice(run_8b(tmp_path), 8, Machine(20 * GIB))


def test_the_knob_of_the_device_goes_before_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of 40 GiB"):
        check_fits(run_8b(tmp_path, device_gib=40.0), 8, 141 * GIB, on_gpu=True)
    with pytest.raises(ConfigError, match="of 20 GiB"):  # there is no more than that
        check_fits(run_8b(tmp_path, 4096, device_gib=200.0), 8, 20 * GIB, on_gpu=True)


def test_the_reserve_counts_on_a_gpu_alone(tmp_path: Path) -> None:
    config = run_8b(tmp_path, reserve_gib=20.0)
    with pytest.raises(ConfigError, match="20 GiB in reserve"):
        check_fits(config, 8, 80 * GIB, on_gpu=True)


def test_a_cpu_has_no_limit_unless_one_is_set(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    check_fits(config, 1, None, on_gpu=False)
    small = run_config(tmp_path, memory={"device_gib": 0.001})
    with pytest.raises(ConfigError, match=r"DOES NOT FIT.* 0 GiB in reserve, of 0\.001 GiB"):
        check_fits(small, 1, None, on_gpu=False)


def test_start_anyway_starts_anyway(tmp_path: Path) -> None:
    check_fits(run_8b(tmp_path, start_anyway=True), 8, GIB, on_gpu=True)


def test_what_leaves_must_have_room_on_the_host(tmp_path: Path) -> None:
    config = run_8b(tmp_path, offload="always")
    _, plan = plan_of(config, 8, Machine())
    assert plan.host_bytes > 10 * GIB
    check_host(config, plan, 8, 8 * plan.host_bytes)
    with pytest.raises(ConfigError, match=r"host memory for 8 ranks, wanted .*start_anyway"):
        check_host(config, plan, 8, 8 * plan.host_bytes - 1)
    check_host(run_8b(tmp_path, offload="always", start_anyway=True), plan, 8, 0)
