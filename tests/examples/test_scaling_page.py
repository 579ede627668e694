"""docs/scaling.md says what the commands in it print today."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from scaling_page import COMMANDS, PAGE, blocks, wanted

BLOCKS = list(product(COMMANDS, ("64", "128")))


@pytest.mark.parametrize(("block", "ranks"), BLOCKS)
def test_the_page_is_what_the_command_prints(block: str, ranks: str) -> None:
    assert blocks()[block, ranks] == wanted(block, ranks), (
        "docs/scaling.md is stale: PYTHONPATH=. python tests/examples/scaling_page.py"
    )


def test_the_page_has_these_blocks_and_says_that_nothing_was_measured_on_gpus() -> None:
    assert set(blocks()) == set(BLOCKS)
    assert "No GPU has confirmed any of this" in PAGE.read_text()
