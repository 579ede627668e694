"""Writing a directory of large files so that a kill loses only the files that were being written.

The directory is filled under a hidden name and renamed when it is whole. Beside it lies a note for
each finished file: size, checksum and what is where in it. Who comes back finds the notes, checks
those files and writes only the others, provided that the same thing is being made of the same
sources. The notes go only after the rename, so a kill at any moment finds them or needs none.
Workers are threads: reading, copying, checksums and writing all run without Python's lock.

    .OUT.converting/notes/FILE.json      and the sources, by which notes are known
    .OUT.converting/made/                becomes OUT
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prime.errors import WeightsError
from megatron_prime.weights import manifest
from megatron_prime.weights.dist_metadata import Piece
from megatron_prime.weights.names import Entry
from megatron_prime.weights.stretches import BLOCK

_TASK = "of.json"
_UNITS = ((9, "GB"), (6, "MB"), (3, "kB"))


@dataclass(frozen=True, slots=True)
class Job:
    """A file to write, and the parameters in it."""

    file: str
    entries: tuple[Entry, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """A finished file."""

    file: str
    size: int
    crc32: int
    pieces: tuple[Piece, ...]


class Summed:
    """A file that knows the checksum of what was written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self.size, self.crc32 = file, 0, 0

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its bytes."""
        view = memoryview(data).cast("B")
        length = len(view)
        for start in range(0, length, BLOCK):  # summed and written while it is in the cache
            block = view[start : start + BLOCK]
            self.crc32 = zlib.crc32(block, self.crc32)
            while block:
                block = block[self._file.write(block) :]
        self.size += length
        return length


Write = Callable[[Job, Summed], tuple[Piece, ...]]


class Workplace:
    """The directory `out` while it is being made, in `folder`."""

    def __init__(self, out: Path, task: dict[str, Any]) -> None:
        if out.exists() or out.is_symlink():
            raise WeightsError(f"{out} exists; move it away or choose another --out")
        self.out, self._hidden = out, hidden(out)
        self.folder, self._notes = self._hidden / "made", self._hidden / "notes"
        with self.disk():
            self._hidden.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._hidden, out)
            noted = self._notes / _TASK
            before = noted.read_text() if noted.exists() else ""
            if before != json.dumps(task) or not self.folder.exists():  # of something else
                for stale in self._hidden.iterdir():
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
                self._notes.mkdir()
                _replace(noted, json.dumps(task))
                self.folder.mkdir()

    @contextmanager
    def disk(self) -> Iterator[None]:
        """Errors of the disk while writing: a full one, a quota, no rights."""
        try:
            yield
        except OSError as error:
            raise WeightsError(
                f"can't write {error.filename or self._hidden}: {error.strerror}; make room, and "
                "the same command continues with the files that are done"
            ) from error

    def finished(self, job: Job) -> Done | None:
        """What is known of a file of before, if it is as it was written."""
        try:
            found = json.loads((self._notes / f"{job.file}.json").read_text())
            pieces = tuple(
                Piece(key, _tuple(offsets), tuple(sizes), start, length)
                for key, offsets, sizes, start, length in found["pieces"]
            )
            done = Done(job.file, found["size"], found["crc32"], pieces)
        except (
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
        ):  # none, or damaged: do it again
            return None
        entry = manifest.Entry(done.size, done.crc32)
        return None if manifest.check(self.folder, job.file, entry) else done

    def make(self, job: Job, write: Write) -> Done:
        """Write a file, to the disk, and its note."""
        path = self.folder / job.file
        with self.disk():
            try:
                with path.open("wb", buffering=0) as file:
                    summed = Summed(file)
                    pieces = write(job, summed)
                    os.fsync(file.fileno())
                done = Done(job.file, summed.size, summed.crc32, pieces)
                _replace(self._notes / f"{job.file}.json", json.dumps(asdict(done)))
            except OSError as error:
                path.unlink(missing_ok=True)
                error.filename = error.filename or str(path)
                raise
        return done

    def write(self, files: dict[str, bytes], folder: str = ".") -> None:
        """Small files by name."""
        with self.disk():
            for name, content in files.items():
                path = self.folder / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def forget(self) -> None:
        """What was made is wrong: the same command begins anew."""
        shutil.rmtree(self._hidden)
        os.close(self._lock)

    def publish(self) -> None:
        """The directory under its own name; it is whole."""
        with self.disk():
            for path in (*self.folder.rglob("*"), self.folder):
                _to_disk(path)
            self.folder.rename(self.out)
            _to_disk(self.out.parent)
        shutil.rmtree(self._hidden)
        os.close(self._lock)


def hidden(out: Path) -> Path:
    """Where `out` is while it is being made."""
    return out.parent / f".{out.name}.converting"


def clear_notes(out: Path) -> None:
    """What a kill has left of the making of `out`, right after it got its name."""
    if hidden(out).exists() and not (hidden(out) / "made").exists():
        shutil.rmtree(hidden(out))


def _locked(folder: Path, out: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise WeightsError(f"another conversion is writing {out}; let it end") from error
    except OSError as error:  # Lustre without -o flock: nothing keeps two apart there
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return lock


def run(
    place: Workplace,
    jobs: Sequence[Job],
    write: Write,
    workers: int,
    report: Callable[[int], None],
) -> list[Done]:
    """All files, in the order of `jobs`; `report` is told the bytes of each file that is there.

    Raises the first worker's error once the others have finished their files.
    """

    def one(job: Job) -> Done:
        done = place.finished(job)
        if done:
            report(job.nbytes)
        return done or place.make(job, write)

    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(one, job) for job in jobs]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done() and future.exception():
                future.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def room_for(out: Path, nbytes: int) -> None:
    """WeightsError when the file system of `out` has too little space."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    there = 0
    for file in hidden(out).rglob("*"):
        with suppress(FileNotFoundError):  # another conversion's, which the lock will find
            there += file.stat().st_size
    free = shutil.disk_usage(parent).free + there
    if free < nbytes:
        unit, name = next(
            ((10**power, name) for power, name in _UNITS if nbytes >= 10**power), (1, "bytes")
        )
        raise WeightsError(
            f"{parent} has {free / unit:,.1f} {name} free, wanted {nbytes / unit:,.1f}; make room "
            "or choose another --out"
        )


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _tuple(found: list[int] | None) -> tuple[int, ...] | None:
    return None if found is None else tuple(found)
