"""Models whose buffers leave the device between steps train as if they had stayed, bit for bit.

Plain and distributed optimizer, in 16 bits (weights are made from masters again) and fp32 (they
are copied). What the four ranks do is in residence_cases.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from launch import run_ranks
from layouts import MOVING

STEPS = 3

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("residence")
    tiny_models.make(folder)
    run_ranks(Path(__file__).with_name("residence_cases.py"), 4, [folder])
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("layout", MOVING)
def test_nothing_tells_the_twins_apart(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        assert len(rank[layout]["same"]) == 6 * STEPS
        assert all(rank[layout]["same"])


@pytest.mark.parametrize("layout", MOVING)
def test_what_leaves_is_not_there_and_moves_no_more_than_it_must(
    ranks: list[dict[str, Any]], layout: str
) -> None:
    for rank in ranks:
        found = rank[layout]
        size, held, moved = found["pieces"], found["held"], found["moved"]
        assert held["nothing"] == [0] * STEPS
        assert held["weights"] == [size["policy.weights"]] * STEPS
        assert held["all"] == [sum(size.values())] * STEPS
        states = size["policy.masters"] + size["policy.moments"]
        assert size["policy.moments"] > 0
        if MOVING[layout][0] == "bf16":
            # Out once a step; masters come twice, once for the weights alone.
            assert moved.to_host == STEPS * states
            assert moved.to_device == STEPS * (states + size["policy.masters"])
        else:
            assert size["policy.masters"] == 0
            states += size["policy.weights"]
            assert (moved.to_host, moved.to_device) == (STEPS * states, STEPS * states)
