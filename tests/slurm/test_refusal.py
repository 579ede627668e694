"""The look at the nodes in a real job: it is asked to end, comes back, and refuses for good."""

from __future__ import annotations

from job import Job
from slurm_client import KNOBS, LOOK, SBATCH, Slurm, ranks_of

ENDLESS = 10**9  # checkpoints, all of them kept: no disk is that large
TOO_MUCH = (f"--run.steps={ENDLESS}", "--checkpoint.every=1", f"--checkpoint.keep={ENDLESS}")


def test_a_refusal_after_a_requeue_is_the_end(
    slurm: Slurm, job: Job, variables: dict[str, object]
) -> None:
    """Asked in the first start's look there is nothing to save; the second start's look refuses."""
    run = job.run("refused")
    found = slurm.submit(SBATCH, *KNOBS, *TOO_MUCH, RUN=run, PREFLIGHT=LOOK, **variables)
    found.wait_until(lambda: len(ranks_of(run)) == 4, "looking at its nodes")
    found.signal("USR1")
    found.wait_for_requeue(1)
    facts = found.wait("FAILED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("78:0", "1"), found.story()
    first, second = found.output.split("requeued 1 times")
    assert "exit code 75: asked to end" in first
    assert "REFUSED" not in first
    refusals = [line for line in second.splitlines() if line.startswith("REFUSED")]
    assert len(refusals) == 1, second
    assert "checkpoint.keep" in refusals[0]
    assert "exit code 78: refused for the reasons above" in second
    assert not (run / "metrics.jsonl").exists()
    assert list((run / "logs").glob("*/rank_*.txt")) == [], "no rank of train was started"
