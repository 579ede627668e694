"""The quickstart's job on 2 emulated nodes × 2 tasks of a real Slurm, stopped in every ordinary way.

Whatever stops it, figures and weights must in the end be those of a run that torchrun started once.
"""

from __future__ import annotations

import re

import pytest
from conftest import KNOBS, STEPS
from job import Job, reproducible
from slurm_client import QUICKSTART, Slurm, ranks_of

SBATCH = QUICKSTART / "run.sbatch"


def assert_same(job: Job, undisturbed: str, name: str) -> None:
    """Figures of all steps and every byte of the exported weights."""
    wanted, found = job.metrics(undisturbed), job.metrics(name)
    assert list(found) == list(wanted)
    for step in wanted:
        assert reproducible(found[step]) == reproducible(wanted[step]), f"step {step}"
    weights = [path.name for path in (job.run(undisturbed) / "hf").glob("*.safetensors")]
    assert weights
    for file in weights:
        parts = (job.run(run) / "hf" / file for run in (undisturbed, name))
        assert len({part.read_bytes() for part in parts}) == 1, file


def test_requeued_twice_killed_once_and_the_same_in_the_end(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    run = job.run("stopped")
    first = slurm.submit(SBATCH, *KNOBS, RUN=run, **variables)
    for requeues, step in enumerate((1, 3)):  # the second start finds the first one's checkpoint
        first.wait_for_step(run, step)
        assert first.restarts == requeues
        first.signal("USR1")
        first.wait_until(lambda: first.restarts > requeues, "requeued")
    first.wait_until(lambda: len(ranks_of(run)) == 4, "started again")
    first.wait_for_step(run, 5)
    ranks = ranks_of(run)
    ranks[3].kill()
    facts = first.wait("FAILED")
    assert facts["ExitCode"] == "137:0"
    assert "ended because rank 3 on " in first.output
    assert "exit code 137: killed, most often out of memory: submit again" in first.output
    assert ranks_of(run) == {}
    second = slurm.submit(SBATCH, *KNOBS, RUN=run, **variables)
    assert second.wait("COMPLETED")["ExitCode"] == "0:0", second.story()
    starts = [int(n) for n in re.findall(r"requeued (\d+) times", first.output + second.output)]
    assert starts == [0, 1, 2, 0]
    said = (run / "logs/latest/rank_00000.txt").read_text()
    assert f"step {STEPS}/{STEPS} " in said
    assert_same(job, undisturbed, "stopped")
