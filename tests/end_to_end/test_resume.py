"""A run that was killed goes on as if nothing had happened, bit for bit, or in another layout."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from job import Job, layout, reproducible

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

GONE_WITHIN_S = 60


@pytest.fixture(scope="module")
def killed(job: Job, full: str) -> tuple[list[str], list[str]]:
    """A run like `full`, one of whose ranks is killed after step 3, and the same command again.

    Returns the processes that outlived the kill by a minute, and the lines logged before it.
    """
    metrics = job.run("killed") / "metrics.jsonl"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(job.start, "train", 4, "killed")
        wait_for_step(metrics, 3, first)
        family = psutil.Process().children(recursive=True)
        ranks = [process for process in family if is_rank(process, job.run("killed"))]
        assert len(ranks) == 4
        ranks[1].kill()
        left = outliving(family)
        with pytest.raises(AssertionError, match="exit status 1"):
            first.result(timeout=60)
    before = metrics.read_text().splitlines()
    half = job.run("killed") / "checkpoints" / "writing_step_000004" / "policy"
    half.mkdir(parents=True, exist_ok=True)
    (half / "__0_0.distcp").write_bytes(b"half of a tensor")
    job.start("train", 4, "killed")
    return left, before


def wait_for_step(metrics: Path, step: int, run: Future[str]) -> None:
    """Return as soon as the step's line is in the file."""
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert not run.done(), run.result()
        time.sleep(0.01)


def is_rank(process: psutil.Process, folder: Path) -> bool:
    """Whether it is one of the run's ranks, not their launcher, verifier or a writer's fork."""
    command = process.cmdline()
    return f"--run.folder={folder}" in command and "torch.distributed.run" not in command


def outliving(family: Sequence[psutil.Process]) -> list[str]:
    """The commands of those who still run after GONE_WITHIN_S; they are killed then."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := [p for p in family if runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    commands = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    return commands


def runs(process: psutil.Process) -> bool:
    """False also for one that merely waits for its parent to collect it."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def exported(job: Job, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.run(name) / "hf").iterdir()}


def test_a_killed_rank_takes_everything_with_it(killed: tuple[list[str], list[str]]) -> None:
    left, _ = killed
    assert left == []


def test_the_same_command_continues_from_the_checkpoint(
    job: Job, killed: tuple[list[str], list[str]]
) -> None:
    _, before = killed
    assert len(before) == 4, "it was killed in step 4"
    after = (job.run("killed") / "metrics.jsonl").read_text().splitlines()
    assert after[:3] == before[:3], "steps 0 to 2 were not done again"
    assert after[3] != before[3], "step 3 was done again and took another time"
    assert not (job.run("killed") / "metrics.previous.jsonl").exists()


def test_every_figure_is_that_of_the_uninterrupted_run(
    job: Job, full: str, killed: tuple[list[str], list[str]]
) -> None:
    expected, found = job.metrics(full), job.metrics("killed")
    assert list(found) == list(expected)
    for step in expected:
        assert reproducible(found[step]) == reproducible(expected[step]), step


def test_the_exported_files_are_those_of_the_uninterrupted_run(
    job: Job, full: str, killed: tuple[list[str], list[str]]
) -> None:
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= exported(job, full).keys()
    assert exported(job, "killed") == exported(job, full)


def test_a_half_written_checkpoint_is_ignored_and_removed(
    job: Job, killed: tuple[list[str], list[str]]
) -> None:
    found = sorted(path.name for path in (job.run("killed") / "checkpoints").iterdir())
    assert found == ["step_000004", "step_000006"]


def test_another_layout_continues(job: Job, full: str) -> None:
    """Saved by TP 2 × PP 2, continued by two data-parallel ranks from step 4."""
    shutil.copytree(job.run(full), job.run("relaid"))
    shutil.rmtree(job.run("relaid") / "checkpoints" / "step_000006")
    job.start("train", 2, "relaid", *layout(tp=1, pp=1))
    before, after = job.metrics(full), job.metrics("relaid")
    assert list(after) == list(before)
    assert after[4] == before[4], "step 4 was not done again"
    assert after[5]["time/step_s"] != before[5]["time/step_s"]
    for name in ("rollout/accuracy", "rollout/tokens", "filter/accuracy"):
        assert after[5][name] == before[5][name], name
    losses = ("prm/loss", "policy/loss", "prm/grad_norm", "policy/grad_norm", "policy/entropy")
    for name in (*losses, "prm/pair_accuracy_before", "rollout/mismatch_max"):
        assert after[5][name] == pytest.approx(before[5][name], abs=1e-4), name


def test_a_truncated_checkpoint_is_named_and_so_is_the_one_before_it(job: Job, full: str) -> None:
    shutil.copytree(job.run(full), job.run("damaged"))
    checkpoints = job.run("damaged") / "checkpoints"
    largest = max((checkpoints / "step_000006" / "prm").iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(AssertionError, match="exit status 1") as raised:
        job.start("train", 2, "damaged", *layout(tp=2, pp=1))
    (message, *_) = [line for line in str(raised.value).splitlines() if line.startswith("[rank 0]")]
    assert f"can't load checkpoint {checkpoints / 'step_000006'}: " in message
    assert message.endswith(f"; move it away to continue from {checkpoints / 'step_000004'}")
