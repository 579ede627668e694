"""A run that was killed goes on as if nothing had happened, bit for bit, or in another layout."""

from __future__ import annotations

import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from job import Job, layout, reproducible
from ranks import GONE_WITHIN_S, Ranks, outliving, wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Hit:
    """What became of a run that was hit."""

    codes: list[int]  # of the ranks that were not
    said: str
    checkpoints: list[str]  # by name
    logged: list[str]  # lines of metrics.jsonl


@dataclass(frozen=True)
class History:
    """A run like `full` that was hit three times and started again each time."""

    signalled: Hit  # SIGUSR1 to rank 2 in step 1
    killed: Hit  # kill -9 of rank 1 after step 3, under torchrun
    outlived: list[str]  # processes that were left a minute after it
    killed_saving: Hit  # kill -9 of rank 0 while step 4 was saved


@pytest.fixture(scope="module")
def history(job: Job, full: str) -> History:
    folder = job.run("hit")
    with Ranks(job, 4, "hit") as ranks:
        ranks.wait_for_step(0)
        ranks.processes[2].send_signal(signal.SIGUSR1)
        signalled = of(folder, ranks.codes(), ranks.said)
    killed, outlived = kill_under_torchrun(job)
    with Ranks(job, 4, "hit") as ranks:
        freeze_while_saving(ranks, 4)
        ranks.processes[0].kill()
        killed_saving = of(folder, ranks.codes(but=[0]), ranks.said)
    job.start("train", 4, "hit")
    return History(signalled, killed, outlived, killed_saving)


def of(folder: Path, codes: list[int], said: str) -> Hit:
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return Hit(codes, said, names, (folder / "metrics.jsonl").read_text().splitlines())


def kill_under_torchrun(job: Job) -> tuple[Hit, list[str]]:
    """After step 3; also returns the processes that outlive it."""
    folder = job.run("hit")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(job.start, "train", 4, "hit")
        wait_for_step(folder, 3, lambda: run.done() and run.result())
        family = psutil.Process().children(recursive=True)
        ranks = [process for process in family if is_rank(process, folder)]
        assert len(ranks) == 4
        victim = next(r for r in ranks if r.environ()["RANK"] == "1")
        victim.kill()
        outlived = outliving(family, GONE_WITHIN_S)
        with pytest.raises(AssertionError, match="exit status 1") as raised:
            run.result(timeout=60)
    return of(folder, [], str(raised.value)), outlived


def freeze_while_saving(ranks: Ranks, step: int) -> None:
    """Stop rank 0, which alone gives a checkpoint its name, before it has done so."""
    checkpoints = ranks.folder / "checkpoints"
    writing = checkpoints / f"writing_step_{step:06d}"
    ranks.wait_for(writing / "policy")
    ranks.processes[0].send_signal(signal.SIGSTOP)
    assert writing.exists(), "it was saved before it could be stopped"


def is_rank(process: psutil.Process, folder: Path) -> bool:
    """Whether it is one of the run's ranks, not their launcher, verifier or a writer's fork."""
    command = process.cmdline()
    return f"--run.folder={folder}" in command and "torch.distributed.run" not in command


def exported(job: Job, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.run(name) / "hf").iterdir()}


def test_a_signal_to_one_rank_saves_the_step_and_ends_all(history: History) -> None:
    hit = history.signalled
    step = len(hit.logged) - 1
    assert hit.codes == [75] * 4
    assert hit.checkpoints == [f"step_{step:06d}"]
    assert f"SIGUSR1: saved step {step}; the same command continues from there" in hit.said
    assert step in (1, 2), "it was sent in step 1; that one may have been over when it came"


def test_a_killed_rank_takes_everything_with_it(history: History) -> None:
    assert history.outlived == []
    assert "ended because rank 1 on" in history.killed.said


def test_a_rank_killed_while_it_saves_ends_all_with_its_name(history: History) -> None:
    hit = history.killed_saving
    assert hit.codes == [69] * 3
    for rank in (1, 2, 3):
        line = f"[rank {rank}] ended because rank 0 on 127.0.0.1 ended: it was killed"
        assert line in hit.said
    assert "Traceback" not in hit.said


def test_what_a_kill_left_of_a_checkpoint_is_ignored_and_removed(
    job: Job, history: History
) -> None:
    assert "writing_step_000004" in history.killed_saving.checkpoints
    assert "step_000004" not in history.killed_saving.checkpoints
    found = sorted(path.name for path in (job.run("hit") / "checkpoints").iterdir())
    assert found == ["step_000004", "step_000006"]


def test_the_same_command_continues_from_the_checkpoint(job: Job, history: History) -> None:
    """Step 3 was logged three times: before either kill, and at last."""
    first, second = history.killed.logged, history.killed_saving.logged
    last = (job.run("hit") / "metrics.jsonl").read_text().splitlines()
    assert len(first) == 4, "it was killed in step 4"
    assert len(second) == 5, "it was killed while it saved step 4, which it had logged"
    assert first[:3] == second[:3] == last[:3], "steps 0 to 2 were not done again"
    assert len({first[3], second[3], last[3]}) == 3, "step 3 was done again, in another time"
    assert not (job.run("hit") / "metrics.previous.jsonl").exists()


def test_every_figure_is_that_of_the_uninterrupted_run(
    job: Job, full: str, history: History
) -> None:
    expected, found = job.metrics(full), job.metrics("hit")
    assert list(found) == list(expected)
    for step in expected:
        assert reproducible(found[step]) == reproducible(expected[step]), step


def test_the_exported_files_are_those_of_the_uninterrupted_run(
    job: Job, full: str, history: History
) -> None:
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= exported(job, full).keys()
    assert exported(job, "hit") == exported(job, full)


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
    lines = str(raised.value).splitlines()
    (said,) = [number for number, line in enumerate(lines) if " is damaged: " in line]
    found = f"checkpoint {checkpoints / 'step_000006'} is damaged: prm/{largest.name}: it has "
    assert re.match(rf"\[rank [01]\] {found}", lines[said])
    assert lines[said].endswith("; step_000004 is whole; continue from it after")
    assert lines[said + 1].split() == [
        "mv",
        str(checkpoints / "step_000006"),
        str(checkpoints / "damaged_step_000006"),
    ]
