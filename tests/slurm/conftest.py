"""One real Slurm for the session, and the job that its tests run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "end_to_end"))
sys.path.append(str(HERE.parent / "distributed"))

from cluster import missing  # noqa: E402
from job import Job  # noqa: E402
from launch import run_ranks  # noqa: E402
from slurm_client import KNOBS, QUICKSTART, Slurm, start_slurm  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the programs, and some patience."""
    lacking = missing()
    why = f"no {', '.join(lacking)}: no Slurm here; tests/run.sh installs it where apt is there"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1500))
            if lacking:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """As many nodes as the largest example asks for, of its size."""
    cluster = start_slurm(tmp_path_factory.mktemp("slurm") / "c", nodes=16, cores=96)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def variables(job: Job) -> dict[str, object]:
    """Of the quickstart's run.sbatch: a smaller model and its data."""
    return {
        "MODEL": job.folder / "start",
        "TRAIN": job.folder / "train.jsonl",
        "EVAL": job.folder / "eval.jsonl",
    }


@pytest.fixture(scope="session")
def undisturbed(job: Job, variables: dict[str, object]) -> str:
    """The name of a run of the same by torchrun, on one node and without a stop."""
    knobs = [f"--model.hf={variables['MODEL']}", f"--data.train={variables['TRAIN']}"]
    knobs += [f"--data.eval={variables['EVAL']}", f"--run.folder={job.run('by_torchrun')}"]
    run_ranks("megatron_prime", 4, ["train", QUICKSTART / "prime.toml", *knobs, *KNOBS])
    return "by_torchrun"
