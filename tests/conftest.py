"""What tests share, and how two processes of pytest share the tests."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from job import Job

HERE = Path(__file__).parent
LONG = ["end_to_end", "sglang", "slurm", "distributed"]  # begun first
TOGETHER = {"end_to_end", "sglang", "slurm"}  # share a run, a server, a cluster


@pytest.hookimpl(wrapper=True)  # before pytest-xdist's own, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Under pytest-xdist a file stays on one worker, or a folder whose tests share what is dear."""

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(HERE).parts[0]

    items.sort(key=lambda item: LONG.index(folder(item)) if folder(item) in LONG else len(LONG))
    for item in items:
        where = folder(item) if folder(item) in TOGETHER else str(item.path.relative_to(HERE))
        item.add_marker(pytest.mark.xdist_group(where))
    return (yield)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Data and a fine-tuned start model, made once."""
    sys.path.append(str(HERE / "end_to_end"))
    from job import make_job

    return make_job(tmp_path_factory.mktemp("job"))
