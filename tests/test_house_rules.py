"""One screen per idea: files and functions stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("megatron_prime/**/*.py"), *ROOT.glob("tools/**/*.py")]
LIMITS = {"config.py": 400, "loop.py": 130}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LIMITS.get(path.name, 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is longer than 60 lines"


def test_no_two_files_of_tests_share_a_name() -> None:
    """Their folders are no packages, so pytest could import only one of them."""
    paths = [path for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    twice = {path.name for path in paths if sum(path.name == other.name for other in paths) > 1}
    assert not twice
