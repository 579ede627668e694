"""The quickstart's job on 2 emulated nodes × 2 tasks of a real Slurm: stopped, killed, continued.

Whatever stops it, figures and weights must in the end be those of a run that torchrun started once.
"""

from __future__ import annotations

import re

from job import Job
from same_run import assert_same
from slurm_client import KNOBS, LOOK, SBATCH, STEPS, Slurm, ranks_of


def test_requeued_and_killed_and_the_same_in_the_end(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    run = job.run("stopped")
    first = slurm.submit(SBATCH, *KNOBS, RUN=run, **variables)
    first.wait_for_step(run, 1)
    assert first.restarts == 0
    first.signal("USR1")
    first.wait_for_requeue(1)
    first.wait_until(lambda: len(ranks_of(run)) == 4, "started again")
    first.wait_for_step(run, 4)
    ranks = ranks_of(run)
    ranks[3].kill()
    facts = first.wait("FAILED")
    assert facts["ExitCode"] == "137:0"
    assert "ended because rank 3 on " in first.output
    assert "exit code 137: killed, most often out of memory: submit again" in first.output
    assert ranks_of(run) == {}
    second = slurm.submit(SBATCH, *KNOBS, RUN=run, PREFLIGHT=LOOK, **variables)
    assert second.wait("COMPLETED")["ExitCode"] == "0:0", second.story()
    rows = re.findall(r"^(n\d+) +(\d–\d) +A +CPU .* shared .* ok ", second.output, re.MULTILINE)
    assert [ranks for _, ranks in rows] == ["0–1", "2–3"], "the look at the nodes first"
    assert [node for node, _ in rows] == second.nodes, "by Slurm's names"
    assert "[preflight] go: " in second.output
    starts = [int(n) for n in re.findall(r"requeued (\d+) times", first.output + second.output)]
    assert starts == [0, 1, 0]
    said = (run / "logs/latest/rank_00000.txt").read_text()
    assert f"step {STEPS}/{STEPS} " in said
    assert_same(job, undisturbed, "stopped")
