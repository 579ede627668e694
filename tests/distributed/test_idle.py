"""Idle time by cause, on ranks that are known to wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from idle_ranks import CHECK_S, FULL_S, HALF_S
from launch import run_ranks

pytestmark = pytest.mark.distributed

ROUNDS = 2
SLACK_S = 0.3  # of a busy machine, over both rounds


def test_the_causes_are_told_apart_and_make_up_the_phase(tmp_path: Path) -> None:
    output = run_ranks(Path(__file__).with_name("idle_ranks.py"), 2, [tmp_path])
    (line,) = (line for line in output.splitlines() if line.startswith("[{"))
    mine, other = json.loads(line)
    generate_s = mine.pop("time/generate_s")
    assert other.pop("time/generate_s") == pytest.approx(generate_s, abs=SLACK_S)
    del mine["time/switch_s"], other["time/switch_s"]
    assert mine == other, "means over the ranks are the same on all of them"

    each_s = [sum(spent) for spent in zip(FULL_S, HALF_S, CHECK_S, strict=True)]
    wanted = {
        "time/busy_generating_s": (sum(FULL_S) + sum(HALF_S) / 2) / 2,
        "time/idle_long_tail_s": sum(HALF_S) / 2 / 2,
        "time/idle_verifying_s": sum(CHECK_S) / 2,
        "time/idle_straggling_s": (max(each_s) - min(each_s)) / 2,
    }
    assert mine.keys() == wanted.keys()
    for name, seconds in wanted.items():
        assert mine[name] == pytest.approx(ROUNDS * seconds, abs=SLACK_S), name
    assert generate_s - SLACK_S < sum(mine.values()) < generate_s + 0.05
