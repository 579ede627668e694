"""docs/scaling.md says what the commands in it print today."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from scaling_page import COMMANDS, OPTIONS, PAGE, blocks, wanted

from megatron_prime.planner.rates import rates_of

BLOCKS = list(product(COMMANDS, ("64", "128")))


@pytest.mark.parametrize(("block", "ranks"), BLOCKS)
def test_the_page_is_what_the_command_prints(block: str, ranks: str) -> None:
    assert blocks()[block, ranks] == wanted(block, ranks), (
        "docs/scaling.md is stale: PYTHONPATH=. python tests/examples/scaling_page.py"
    )


def test_the_page_has_these_blocks_and_says_that_nothing_was_measured_on_gpus() -> None:
    assert set(blocks()) == set(BLOCKS)
    assert "No GPU has confirmed any of this" in PAGE.read_text()


def test_the_weight_sync_has_the_rates_of_the_steps() -> None:
    rates = rates_of("h100")
    given = dict(zip(OPTIONS["reshard"][::2], map(float, OPTIONS["reshard"][1::2]), strict=True))
    wanted_rates = {"--gb-per-s": rates.nvlink / 1e9, "--network-gb-per-s": rates.network / 1e9}
    assert given == pytest.approx(wanted_rates)
