"""Ranked layouts are valid, fit, and are what a plan of their own says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned_runs import run_config

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.engine_bytes import NoRoomForServers
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import GIB, Machine
from megatron_prime.planner.rates import GPUS
from megatron_prime.planner.search import search
from megatron_prime.planner.seconds import predict
from megatron_prime.planner.table import plan_of

H100 = GPUS["h100"]
SGLANG = {"engine": "sglang"}


def nested(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        table, key = name.split(".")
        found.setdefault(table, {})[key] = value
    return found


def run_8b(folder: Path, **tables: Any) -> RunConfig:
    return run_config(folder, "Llama-3-8B", **tables)


def test_the_best_is_what_its_lines_say(tmp_path: Path) -> None:
    """Its TOML lines, put into a fresh run, give the same plan and the same seconds."""
    config = run_8b(tmp_path, rollout=SGLANG)
    expected = Expectations.of(config)
    found = search(config, 8, Machine(), H100, expected)
    assert 0 < found.fitting < found.tried
    steps = [layout.step.seconds for layout in found.layouts]
    assert steps == sorted(steps)
    assert all(layout.fits for layout in found.layouts)
    for layout in (found.layouts[0], found.layouts[-1]):
        tables = nested(layout.options)
        tables["rollout"] |= SGLANG
        again = run_8b(tmp_path, **tables)
        table, plan = plan_of(again, 8, Machine())
        step = predict(again, plan, table, H100, expected)
        assert plan.peak.device == layout.device_bytes
        assert step.seconds == layout.step.seconds
        assert layout.tp * layout.pp * layout.cp * layout.dp == 8


def test_only_layouts_that_divide_are_tried(tmp_path: Path) -> None:
    """Qwen2.5-7B: 28 heads, 4 key/value heads, 28 layers."""
    config = run_config(tmp_path, "Qwen2.5-7B", rollout=SGLANG)
    found = search(config, 16, Machine(1000 * GIB), H100, Expectations.of(config))
    assert found.fitting == found.tried
    assert {layout.tp for layout in found.layouts} == {1, 2, 4}
    assert {layout.pp for layout in found.layouts} == {1, 2, 4}
    assert {layout.rollout_tp for layout in found.layouts} == {1, 2, 4}
    assert not any(layout.sequence_parallel and layout.tp == 1 for layout in found.layouts)


def test_what_batches_can_not_be_shared_by_is_left_out(tmp_path: Path) -> None:
    """A mini-batch of 4 has no share for 8 replicas."""
    batches = {"policy": {"mini_batch_size": 4}, "prm": {"mini_batch_size": 4}}
    config = run_8b(tmp_path, rollout=SGLANG, **batches)
    found = search(config, 8, Machine(1000 * GIB), H100, Expectations.of(config))
    assert {layout.dp for layout in found.layouts} == {1, 2, 4}


def test_with_room_nothing_moves_and_recomputing_is_no_use(tmp_path: Path) -> None:
    config = run_8b(tmp_path, rollout=SGLANG, sglang={"max_total_tokens": 200_000})
    best = search(config, 8, Machine(1000 * GIB), H100, Expectations.of(config)).layouts[0]
    assert (best.offload, best.recompute) == ("never", "none")


def test_the_smallest_is_shown_when_none_fits(tmp_path: Path) -> None:
    config = run_8b(tmp_path, rollout=SGLANG, sglang={"max_total_tokens": 4096})
    found = search(config, 8, Machine(10 * GIB), H100, Expectations.of(config))
    assert found.fitting == 0
    (smallest,) = found.layouts
    assert not smallest.fits
    assert (smallest.recompute, smallest.offload) == ("full", "auto")


def test_layouts_whose_servers_have_no_room_are_left_out(tmp_path: Path) -> None:
    """0.4 of 29.5 GiB: 15 GiB of weights want two ranks or more. Of 3.5 GiB: none has room."""
    config = run_8b(tmp_path, rollout=SGLANG)
    found = search(config, 8, Machine(36 * GIB), H100, Expectations.of(config))
    assert found.fitting > 0
    assert {layout.rollout_tp for layout in found.layouts} == {2, 4, 8}
    with pytest.raises(NoRoomForServers, match=r"none of \d+ layouts fits; .*of the 3\.5 GiB"):
        search(config, 8, Machine(10 * GIB), H100, Expectations.of(config))


def test_a_run_that_no_layout_can_help_is_refused(tmp_path: Path) -> None:
    """Packs of 100 tokens have no room for the longest sequence, however many ranks share it."""
    config = run_8b(tmp_path, rollout=SGLANG, policy={"micro_batch_tokens": 100})
    with pytest.raises(ConfigError, match=r"no layout for 8 ranks(.|\n)*micro_batch_tokens"):
        search(config, 8, Machine(), H100, Expectations.of(config))
