"""What a kill leaves and the same command makes of it, full disks, publishing, and --verify."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
import torch
from safetensors.torch import load_file

from megatron_prime.errors import WeightsError
from megatron_prime.weights import shard_jobs, torch_dist
from megatron_prime.weights.convert import to_hf, to_megatron
from megatron_prime.weights.convert_plan import Options

ROOT = Path(__file__).parents[2]
TO_MEGATRON = ROOT / "tools" / "convert_hf_to_megatron.py"
TO_HF = ROOT / "tools" / "convert_megatron_to_hf.py"


def quiet(*_: object, **__: object) -> None:
    pass


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return synthetic.make(tmp_path / "hf", synthetic.SMALL)


def tool(*arguments: object, limit: int | None = None) -> subprocess.Popen[str]:
    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limited,
    )


def test_a_full_disk_is_named_and_the_same_command_continues(tmp_path: Path, hf: Path) -> None:
    arguments = (TO_MEGATRON, "--hf", hf, "--out", tmp_path / "dist")
    full = tool(*arguments, limit=20_000)
    output, _ = full.communicate(timeout=120)
    assert full.returncode == 1
    assert "can't write" in output
    assert (
        "File too large; make room, and the same command continues with the files that are done"
        in output
    )
    assert "Traceback" not in output
    assert not (tmp_path / "dist").exists()
    again = tool(*arguments, "--verify")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "verified: 30 tensors" in output


def test_a_kill_loses_only_the_file_that_was_being_written(tmp_path: Path) -> None:
    config = synthetic.SMALL | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    hf = synthetic.make(tmp_path / "hf", config | {"num_hidden_layers": 24})
    writing = tmp_path / ".dist.converting"
    command = (TO_MEGATRON, "--hf", hf, "--out", tmp_path / "dist", "--max-shard-gb", 0.009)
    killed = tool(*command, "--workers", 1)
    deadline = time.monotonic() + 120
    while len(list(writing.glob("notes/__*.json"))) < 3:
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "dist").exists()
    finished = [note.name.removesuffix(".json") for note in writing.glob("notes/__*.json")]
    before = {name: (writing / "made" / name).stat().st_mtime_ns for name in finished}
    spoiled = finished[0]
    with (writing / "made" / spoiled).open("r+b") as file:  # same size, another byte
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    again = tool(*command, "--verify")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "verified" in output
    after = {name: (tmp_path / "dist" / name).stat().st_mtime_ns for name in finished}
    assert {name for name in finished if before[name] == after[name]} == set(finished) - {spoiled}
    assert not list((tmp_path / "dist").rglob("*of.json"))
    assert not writing.exists()


def test_another_source_does_not_continue_the_first(tmp_path: Path, hf: Path) -> None:
    """The notes of a conversion are kept only for the same files and options."""
    task = {"of": "one"}
    place = shard_jobs.Workplace(tmp_path / "dist", task)
    job = shard_jobs.Job("a", (), 3)
    place.make(job, lambda _, file: file.write(b"abc") and ())
    with pytest.raises(WeightsError, match="another conversion is writing"):
        shard_jobs.Workplace(tmp_path / "dist", task)
    os.close(place._lock)
    again = shard_jobs.Workplace(tmp_path / "dist", task)
    done = again.finished(job)
    assert done is not None
    assert done.size == 3
    os.close(again._lock)
    assert shard_jobs.Workplace(tmp_path / "dist", {"of": "other"}).finished(job) is None


class Killed(BaseException):
    """In place of SIGKILL: nobody catches it."""


def test_to_hf_continues_after_a_kill(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist, back = tmp_path / "dist", tmp_path / "back"
    to_megatron(hf, dist, Options(), quiet)
    options, made = Options(shard_bytes=9000), shard_jobs.Workplace.make

    def dies_from_the_third_on(self, job, write):
        if job.file >= "model-00003":
            raise Killed
        return made(self, job, write)

    monkeypatch.setattr(shard_jobs.Workplace, "make", dies_from_the_third_on)
    with pytest.raises(Killed):
        to_hf(dist, hf, back, options, quiet)
    monkeypatch.undo()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".back.converting/made").iterdir()}
    assert len(before) == 2
    told = []
    _let_go()
    to_hf(dist, hf, back, options, lambda done, total, before=0, what="": told.append(before))
    after = {path.name: path.stat().st_mtime_ns for path in back.iterdir()}
    assert {name: after[name] for name in before} == before
    assert told[-1] == sum((back / n).stat().st_size for n in before) - _tables(back, before)
    truth = load_file(hf / "model.safetensors")
    found = {k: v for file in back.glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def _tables(folder: Path, names: object) -> int:
    return sum(
        8 + int.from_bytes((folder / name).read_bytes()[:8], "little")
        for name in names  # type: ignore[attr-defined]
    )


def _let_go() -> None:
    """Of locks, as the end of a process would."""
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.endswith(".converting"):
            os.close(int(number))


@pytest.mark.parametrize("where", ["_to_disk", "rename", "rmtree"])
def test_a_kill_while_publishing_loses_nothing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def dies(*_: object) -> None:
        raise Killed

    dist, hidden = tmp_path / "dist", tmp_path / ".dist.converting"
    owner = {"_to_disk": shard_jobs, "rename": Path, "rmtree": shard_jobs.shutil}[where]
    monkeypatch.setattr(owner, where, dies)
    with pytest.raises(Killed):
        to_megatron(hf, dist, Options(), quiet)
    monkeypatch.undo()
    _let_go()
    folder = dist if where == "rmtree" else hidden / "made"
    before = (folder / "__0_0.distcp").stat().st_mtime_ns
    if (
        where == "rmtree"
    ):  # it is there, and whole; only notes are left, and the next look clears them
        to_megatron(hf, dist, Options(verify=True), quiet)
        assert not hidden.exists()
    else:
        to_megatron(hf, dist, Options(), quiet)
    assert (dist / "__0_0.distcp").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dist", "hf"]


def test_a_full_disk_outside_the_shards_says_so_too(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(torch_dist, "write_metadata", full)
    with pytest.raises(WeightsError, match=r"can't write .*/x: No space left .* same command con"):
        to_megatron(hf, tmp_path / "dist", Options(), quiet)


def run(*arguments: object) -> tuple[int, str]:
    child = tool(*arguments)
    output, _ = child.communicate(timeout=120)
    return child.returncode, output


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_verify_of_what_is_there_compares_and_writes_nothing(tmp_path: Path, hf: Path) -> None:
    dist = tmp_path / "dist"
    command = (TO_MEGATRON, "--hf", hf, "--out", dist, "--verify")
    assert run(*command)[0] == 0
    status, output = run(*command)
    assert status == 0
    assert "wrote" not in output
    assert "verified: 30 tensors" in output
    flip(dist / "__0_0.distcp", 2000)
    status, output = run(*command)
    assert status == 1
    assert "model.embed_tokens.weight" in output
    assert "Traceback" not in output
    flip(dist / "__0_0.distcp", 2000)
    (dist / "hf" / "tokenizer.json").write_text("{}")
    status, output = run(*command)
    assert status == 1
    assert "tokenizer.json is not what it was made of" in output


def test_a_damaged_source_is_not_called_verified(tmp_path: Path, hf: Path) -> None:
    dist = tmp_path / "dist"
    to_megatron(hf, dist, Options(), quiet)
    flip(dist / "__0_0.distcp", 2000)
    status, output = run(TO_HF, "--checkpoint", dist, "--out", tmp_path / "back", "--verify")
    assert status == 1
    assert "__0_0.distcp: its bytes are not those that were written" in output
    assert not (tmp_path / "back").exists()


def test_what_fails_its_verification_is_not_published(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = shard_jobs.Summed.write

    def wrong(self, data):
        data = bytes(data)
        return written(self, data[:-1] + bytes([data[-1] ^ 1]) if len(data) == 3200 else data)

    monkeypatch.setattr(shard_jobs.Summed, "write", wrong)  # the embedding has 50 x 32 numbers
    with pytest.raises(WeightsError, match=r"embed_tokens.*not what.*nothing is published"):
        to_megatron(hf, tmp_path / "dist", Options(verify=True), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tp", "0"], ["--tp", "-2"], ["--pp", "0"], ["--pp", "4"], ["--workers", "0"],
        ["--max-shard-gb", "nan"], ["--max-shard-gb", "-1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_numbers_are_told_and_leave_nothing(
    tmp_path: Path, hf: Path, wrong: list[str]
) -> None:
    status, output = run(TO_MEGATRON, "--hf", hf, "--out", tmp_path / "dist", *wrong)
    assert status in (1, 2)
    assert "wanted" in output
    assert wrong[0] in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
