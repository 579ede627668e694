"""Every way to lose a rank, at several moments; and what torchrun makes of signals.

The runs of one chain continue each other, and must together have the figures of `full`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from job import Job, reproducible
from launch import free_port
from ranks import Ranks, wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000), pytest.mark.slow]

# (rank, moment): a step's phases follow each other as generate, score, update, sync, save.
KILLS = [(0, 0.1), (3, 0.1), (0, 0.5), (2, 0.5), (1, 0.9), (0, 0.9)]


def test_killed_at_many_moments(job: Job, full: str) -> None:
    """Each rank at some fraction of a step; a checkpoint of every step, so that all get on."""
    knobs = ["--checkpoint.every=1"]
    seconds = job.metrics(full)[5]["time/step_s"]
    for number, (rank, fraction) in enumerate(KILLS):
        with Ranks(job, 4, "killed", *knobs) as ranks:
            ranks.wait_for_step(min(number, 5))
            time.sleep(fraction * seconds)
            ranks.processes[rank].kill()
            assert set(ranks.codes(but=[rank])) == {69}, ranks.said
    with Ranks(job, 4, "killed", *knobs) as ranks:
        assert ranks.codes(within_s=600) == [0] * 4
    assert_same_figures(job, full, "killed")


def test_another_rank_killed_while_a_checkpoint_is_written(job: Job, full: str) -> None:
    with Ranks(job, 4, "writer") as ranks:
        ranks.wait_for(ranks.folder / "checkpoints" / "writing_step_000004" / "policy")
        ranks.processes[0].send_signal(signal.SIGSTOP)  # who would give it its name
        ranks.processes[3].kill()
        ranks.processes[0].send_signal(signal.SIGCONT)
        assert ranks.codes(but=[3]) == [69] * 3, ranks.said
    names = {path.name for path in (job.run("writer") / "checkpoints").iterdir()}
    assert names == {"step_000002", "writing_step_000004"}
    with Ranks(job, 4, "writer") as ranks:
        assert ranks.codes(within_s=600) == [0] * 4
    assert_same_figures(job, full, "writer")


def test_a_phase_that_takes_too_long(job: Job) -> None:
    """Nothing hangs here; the deadlines are such that no phase can keep them."""
    phases = ("evaluate", "generate", "score", "update_prm", "update_policy")
    with Ranks(job, 4, "stuck", *(f"--deadline.{phase}_s=0.001" for phase in phases)) as ranks:
        assert ranks.codes(within_s=300) == [70] * 4, ranks.said
        said = ranks.said
    assert re.search(r"phase \w+ has lasted longer than 0\.001 s on this rank", said)
    stacks = sorted((job.run("stuck") / "stuck").iterdir())
    assert [path.name for path in stacks] == [f"rank_{rank:05d}.txt" for rank in range(4)]
    for path in stacks:
        assert "loop.py" in path.read_text(), "where the main thread is"
    with Ranks(job, 4, "stuck", "--run.steps=1") as ranks:
        assert ranks.codes(within_s=300) == [0] * 4, ranks.said
    assert stacks == sorted((job.run("stuck") / "stuck").iterdir()), "to be looked at later"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_frozen_rank_is_given_up(job: Job, rank: int) -> None:
    with Ranks(job, 4, f"frozen_{rank}") as ranks:
        ranks.wait_for_step(1)
        ranks.processes[rank].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert ranks.codes(within_s=60, but=[rank]) == [69] * 3
        assert time.monotonic() - started > 40, "its patience is 45 s"
        assert f"ended because rank {rank} on " in ranks.said
        assert "no sign of life" in ranks.said


def test_a_signal_ends_at_once_what_has_nothing_to_save(job: Job) -> None:
    with Ranks(job, 2, "rollout_signalled", "--run.steps=5000", command="rollout") as ranks:
        ranks.wait_for(ranks.folder / "rollouts" / "step_000003.jsonl")
        ranks.processes[1].send_signal(signal.SIGTERM)
        assert ranks.codes() == [69, 143]
        assert "SIGTERM: ended at once, for there is nothing to save here" in ranks.said


def test_torchrun_passes_sigterm_on_and_ends_with_1(job: Job) -> None:
    code, said = signal_torchrun(job, "terminated", signal.SIGTERM, shield="")
    assert code == 1
    assert "SIGTERM: saved step" in said


def test_torchrun_dies_of_sigusr1_and_nothing_is_saved(job: Job) -> None:
    code, said = signal_torchrun(job, "unshielded", signal.SIGUSR1, shield="")
    assert code == -signal.SIGUSR1
    assert "saved step" not in said


def test_torchrun_that_ignores_sigusr1_lets_its_ranks_save(job: Job) -> None:
    """As Slurm does it: the signal goes to all processes of the job step."""
    code, said = signal_torchrun(
        job, "shielded", signal.SIGUSR1, shield="trap '' USR1; ", everybody=True
    )
    assert code == 1
    assert "SIGUSR1: saved step" in said
    assert list((job.run("shielded") / "checkpoints").glob("step_*"))


def signal_torchrun(
    job: Job, name: str, number: signal.Signals, shield: str, everybody: bool = False
) -> tuple[int, str]:
    """Exit code and output of a torchrun that is signalled in step 2, alone or with its ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command += [
        "-m",
        "megatron_prime",
        "train",
        *job.arguments(name),
        "--checkpoint.every=0",
        "--run.steps=500",
    ]
    launcher = psutil.Popen(
        ["sh", "-c", f'{shield}exec "$@"', "sh", *command],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = [launcher]
    try:
        wait_for_step(job.run(name), 1, lambda: launcher.poll())
        family += launcher.children(recursive=True)
        for process in family if everybody else [launcher]:
            process.send_signal(number)
        said, _ = launcher.communicate(timeout=120)
        return launcher.returncode, said
    finally:
        for process in family:
            if process.is_running():
                process.kill()


def assert_same_figures(job: Job, full: str, name: str) -> None:
    expected, found = job.metrics(full), job.metrics(name)
    assert list(found) == list(expected)
    for step in expected:
        assert reproducible(found[step]) == reproducible(expected[step]), step
