"""The SGLang engine of two ranks on fake servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import free_port, run_ranks

pytestmark = pytest.mark.distributed
CASES = Path(__file__).with_name("fake_server_cases.py")


@pytest.mark.parametrize("case", ["two", "one", "hang"])
def test_two_ranks(tmp_path: Path, case: str) -> None:
    """`two` servers of one rank each; `one` of two ranks; one of two, of which one `hang`s."""
    run_ranks(CASES, 2, [case, tmp_path, free_port()])
