"""What tests share, and how two processes of pytest share the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from job import Job

HERE = Path(__file__).parent
LONG = ["end_to_end", "sglang", "slurm", "distributed"]  # begun first
TOGETHER = {"end_to_end", "sglang", "slurm"}  # share a run, a server, a cluster


def _folder(nodeid: str) -> str:
    """Of tests/sglang/test_run.py::test_it: sglang."""
    return nodeid.split("/")[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first, so that none is left alone at the end."""

    def rank(item: pytest.Item) -> int:
        return LONG.index(where) if (where := _folder(item.nodeid)) in LONG else len(LONG)

    items.sort(key=rank)


class _Together(LoadScopeScheduling):
    """A file stays on one worker, or a folder whose tests share what is dear."""

    def _split_scope(self, nodeid: str) -> str:
        folder = _folder(nodeid)
        return folder if folder in TOGETHER else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With `pytest -n 2 --dist loadscope`."""
    return _Together(config, log)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Data and a fine-tuned start model, made once."""
    sys.path.append(str(HERE / "end_to_end"))
    from job import make_job

    return make_job(tmp_path_factory.mktemp("job"))
