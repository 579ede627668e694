"""Time limits, lost nodes, cancelled jobs, arrays and a full disk on a real Slurm.

Where a run goes on, figures and weights are in the end those of a run that was never stopped.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from job import Job
from same_run import assert_same
from slurm_client import KNOBS, SBATCH, STEPS, Slurm, Submitted, ranks_of

pytestmark = pytest.mark.slow


@contextmanager
def frozen(ranks: Mapping[int, psutil.Process]) -> Iterator[None]:
    """Nobody works inside: so a step lasts as long as the test wants."""
    for rank in ranks.values():
        rank.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for rank in ranks.values():
            rank.send_signal(signal.SIGCONT)


def is_asked(rank: psutil.Process) -> bool:
    """Whether USR1 waits for a frozen rank; from the job's shell to there it takes a while."""
    status = Path(f"/proc/{rank.pid}/status").read_text()
    (waiting,) = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return bool(int(waiting, 16) >> (signal.SIGUSR1 - 1) & 1)


def last_step(run: Path) -> int:
    """That metrics.jsonl has; 0 before the first."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((int(json.loads(line)["step"]) for line in lines), default=0)


def test_the_time_limit_as_often_as_it_takes(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    """Slurm looks at its clock every 30 s, so USR1 comes 50 to 80 s after each start."""
    run = job.run("limited")
    limit = ["--time=2", "--signal=B:USR1@40", SBATCH, *KNOBS, "--run.lost_after_s=600"]
    found = slurm.submit(*limit, RUN=run, **variables)
    for requeues in (0, 1):
        found.wait_until(lambda: len(ranks_of(run)) == 4, "started")
        ranks = ranks_of(run)  # before the step, for to look for them may take as long as one
        found.wait_for_step(run, last_step(run) + 1)
        with frozen(ranks):
            found.wait_until(lambda ranks=ranks: all(map(is_asked, ranks.values())), "asked")
        found.wait_for_requeue(requeues + 1)
    assert found.wait("COMPLETED")["ExitCode"] == "0:0"
    assert found.restarts >= 2
    assert_same(job, undisturbed, "limited")


def test_the_limit_itself_saves_and_ends_the_job(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    """Without a signal before it: SIGTERM, and SIGKILL after KillWait, which is 30 s here."""
    run = job.run("timeout")
    found = slurm.submit(
        "--time=2",
        "--signal=B:CONT@1",  # nobody minds
        SBATCH,
        *KNOBS,
        "--checkpoint.every=0",
        "--run.lost_after_s=600",
        RUN=run,
        **variables,
    )
    found.wait_for_step(run, 1)
    with frozen(ranks_of(run)):
        found.wait_until(lambda: "TERM: ranks finish" in found.output, "at its limit")
    facts = found.wait("TIMEOUT")
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0")
    assert "exit code 75: asked to end" in found.output
    assert "not requeued; the same sbatch command continues the run" in found.output
    again = slurm.submit(SBATCH, *KNOBS, "--checkpoint.every=0", RUN=run, **variables)
    again.wait("COMPLETED")
    assert_same(job, undisturbed, "timeout")


def test_a_cancelled_job_saves_and_stays_away(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    run = job.run("cancelled")
    found = slurm.submit(SBATCH, *KNOBS, RUN=run, **variables)
    found.wait_for_step(run, 1)
    found.cancel()
    facts = found.wait("CANCELLED")
    assert (facts["ExitCode"], facts["Restarts"]) == ("75:0", "0")
    assert "SIGTERM: saved step" in found.output or "SIGUSR1: saved step" in found.output
    assert list((run / "checkpoints").glob("step_*"))
    assert ranks_of(run) == {}
    slurm.submit(SBATCH, *KNOBS, RUN=run, **variables).wait("COMPLETED")
    assert_same(job, undisturbed, "cancelled")


def test_a_killed_slurmd(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    """Its tasks live on and train; only when Slurm misses it is the job asked to end, and saves."""
    run = job.run("slurmd")
    found = slurm.submit(SBATCH, *KNOBS, "--run.lost_after_s=600", RUN=run, **variables)
    found.wait_for_step(run, 3)
    second = found.nodes[1]
    slurm.kill_slurmd(second)
    with frozen(ranks_of(run)):
        found.wait_until(lambda: "Node failure" in found.output, "missed by Slurm")
    assert_goes_on_elsewhere(slurm, found, second)
    assert "the same sbatch command continues the run" in found.output, "Slurm has requeued it"
    assert_same(job, undisturbed, "slurmd")


def test_a_lost_node(
    slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    """slurmd, job steps and ranks at once; Slurm misses it before srun's --wait is over."""
    run = job.run("node")
    found = slurm.submit(SBATCH, *KNOBS, RUN=run, **variables)
    found.wait_for_step(run, 3)
    second, ranks = found.nodes[1], ranks_of(run)
    slurm.kill_slurmd(second)
    for process in [ranks[2].parent(), ranks[3].parent(), ranks[2], ranks[3]]:
        if process is not None and process.is_running():
            process.kill()
    assert_goes_on_elsewhere(slurm, found, second)
    assert_same(job, undisturbed, "node")


def assert_goes_on_elsewhere(slurm: Slurm, found: Submitted, lost: str) -> None:
    """Slurm requeues the job, a spare node takes the lost one's place, and it comes back."""
    try:
        found.wait_for_requeue(1)
        assert found.wait("COMPLETED")["ExitCode"] == "0:0"
        assert lost not in found.nodes
    finally:
        slurm.start_slurmd(lost)
        found.wait_until(lambda: slurm.node_states()[lost] == "idle", "back")


def test_an_array_of_three_seeds(slurm: Slurm, job: Job, variables: dict[str, object]) -> None:
    """All three asked at once to save: each requeues itself, and ends in its own folder."""
    run = job.run("seeds")
    array = slurm.submit("--array=0-2", SBATCH, *KNOBS, RUN=run, **variables)
    tasks = [Submitted(slurm, f"{array.number}_{seed}") for seed in range(3)]
    for seed, task in enumerate(tasks):
        task.wait_for_step(run / f"seed_{seed}", 1)
        task.signal("USR1")
        task.wait_for_requeue(1)
    losses = set()
    for seed, task in enumerate(tasks):
        assert task.wait("COMPLETED")["ExitCode"] == "0:0"
        metrics = job.metrics(f"seeds/seed_{seed}")
        assert list(metrics) == list(range(STEPS + 1))
        losses.add(metrics[STEPS]["prm/loss"])
        assert re.search(rf"^seed = {seed}$", (run / f"seed_{seed}/config.toml").read_text(), re.M)
    assert len(losses) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for one checkpoint, not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(
    small_disk: Path, slurm: Slurm, job: Job, undisturbed: str, variables: dict[str, object]
) -> None:
    """Stops with the cause and code 1; with room again, the same command goes on."""
    run = small_disk / "run"
    found = slurm.submit(SBATCH, *KNOBS, RUN=run, **variables)
    facts = found.wait("FAILED")
    assert facts["ExitCode"] == "1:0", found.story()
    assert "No space left on device" in found.output
    room = ["mount", "-o", "remount,size=100m", str(small_disk)]
    subprocess.run(room, check=True)
    time.sleep(0.1)
    slurm.submit(SBATCH, *KNOBS, RUN=run, **variables).wait("COMPLETED")
    job.run("full_disk").symlink_to(run)
    assert_same(job, undisturbed, "full_disk")
