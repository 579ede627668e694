"""Writing a directory of large files so that a kill loses only the files that were being written.

The directory is filled under a hidden name beside its own and renamed when it is whole. Beside each
finished file lies a note: size, checksum and what is where in it. Who comes back finds the notes,
checks those files and writes only the others, provided that the same thing is being made of the
same sources. Workers are threads (reading, copying, checksums and writing all run without Python's
lock); what they hold in memory at once comes out of one budget, so that more of them need no more.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prime.weights import manifest
from megatron_prime.weights.names import Entry
from megatron_prime.weights.safetensors_io import WeightsError
from megatron_prime.weights.torch_dist import Piece

_BLOCK = 1 << 20  # bytes
_TASK = "conversion.json"


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


class Budget:
    """Bytes that all workers together may hold."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait until `nbytes` are free; what is larger than all of it waits for all of it."""
        nbytes = min(nbytes, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._held + nbytes <= self._limit)
            self._held += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()


class Summed:
    """A file that knows the checksum of what was written to it.

    An error of the disk is kept for `flush`: torch.save would hide it behind one of its own.
    """

    def __init__(self, file: Any) -> None:
        self._file, self.size, self.crc32 = file, 0, 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its bytes."""
        view = memoryview(data).cast("B")
        length = len(view)
        for start in range(0, length, _BLOCK):  # summed and written while it is in the cache
            block = view[start : start + _BLOCK]
            self.crc32 = zlib.crc32(block, self.crc32)
            try:
                while block and not self._error:
                    block = block[self._file.write(block) :]
            except OSError as error:
                self._error = error
        self.size += length
        return length

    def flush(self) -> None:
        """Raise what the disk has said."""
        if self._error:
            raise self._error


Write = Callable[[Job, Summed], tuple[Piece, ...]]


class Workplace:
    """The directory `out` while it is being made."""

    def __init__(self, out: Path, task: dict[str, Any]) -> None:
        if out.exists():
            raise WeightsError(f"{out} exists; move it away or choose another --out")
        self.out, self.folder = out, out.parent / f".{out.name}.converting"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WeightsError(f"another conversion is writing {out}; let it end") from error
        noted = self.folder / _TASK
        before = noted.read_text() if noted.exists() else ""
        if before != json.dumps(task):  # of something else
            for stale in self.folder.iterdir():
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            _replace(noted, json.dumps(task))

    def finished(self, job: Job) -> Done | None:
        """What is known of a file of before, if it is as it was written."""
        note = self.folder / f"{job.file}.done"
        if not note.exists():
            return None
        found = json.loads(note.read_text())
        pieces = tuple(
            Piece(p["key"], _tuple(p["offsets"]), tuple(p["sizes"]), p["start"], p["length"])
            for p in found["pieces"]
        )
        done = Done(job.file, found["size"], found["crc32"], pieces)
        entry = manifest.Entry(done.size, done.crc32)
        return None if manifest.check(self.folder, job.file, entry) else done

    def make(self, job: Job, write: Write) -> Done:
        """Write a file, to the disk, and its note."""
        path = self.folder / job.file
        try:
            with path.open("wb", buffering=0) as file:
                summed = Summed(file)
                pieces = write(job, summed)
                summed.flush()
                os.fsync(file.fileno())
            done = Done(job.file, summed.size, summed.crc32, pieces)
            _replace(self.folder / f"{job.file}.done", json.dumps(asdict(done)))
        except OSError as error:  # the disk is full, a quota, no rights
            path.unlink(missing_ok=True)
            raise WeightsError(
                f"can't write {path}: {error.strerror}; make room, and the same command "
                "continues with the files that are done"
            ) from error
        return done

    def publish(self) -> None:
        """The directory under its own name, without the notes; it is whole."""
        for note in (*self.folder.glob("*.done"), self.folder / _TASK):
            note.unlink()
        for path in (*self.folder.rglob("*"), self.folder):
            _to_disk(path)
        self.folder.rename(self.out)
        _to_disk(self.out.parent)
        os.close(self._lock)


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
    held = out.parent / f".{out.name}.converting"
    there = sum(f.stat().st_size for f in held.rglob("*") if f.is_file()) if held.exists() else 0
    free = shutil.disk_usage(parent).free + there
    if free < nbytes:
        raise WeightsError(
            f"{parent} has {free / 1e9:,.1f} GB free, wanted {nbytes / 1e9:,.1f} GB; make room or "
            "choose another --out"
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
