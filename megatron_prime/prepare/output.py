"""A folder of training files that is there whole or not at all.

Files are written in a hidden folder `.NAME.preparing` beside the wanted one, which is renamed when
all of them are on the disk. What a killed command left there is removed by the next one; two at the
same time are refused. Rows go to jsonl or parquet as they come.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_prime.data.rows import Row
from megatron_prime.errors import RunError

_ROW_GROUP = 1000  # rows held back for a parquet row group
SUFFIXES = (".jsonl", ".parquet")


class OutputError(RunError):
    """The output folder can't be made."""


class RowFile(Protocol):
    """Takes rows, one at a time."""

    def write(self, row: Row) -> None:
        """Append a row."""

    def close(self) -> None:
        """Write what was held back, and make it last."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, renamed to `folder` if the block ends without an error.

    OutputError if `folder` exists, or if another process is writing it.
    """
    if folder.exists():
        raise OutputError(f"found {folder}, wanted a new folder; give another --out or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name}.preparing"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        _claim(lock, work, folder)
        for left in work.iterdir():  # by a command that was killed
            left.unlink()
        try:
            yield work
            _sync(work)
            work.rename(folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _claim(lock: int, work: Path, folder: Path) -> None:
    """Lock the folder `work`, which must still be the one that `lock` has open."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claimed = work.exists() and os.path.samestat(os.fstat(lock), work.stat())
    except BlockingIOError:  # told as what it means
        claimed = False
    if not claimed:
        raise OutputError(
            f"found another process that writes {folder}; wait for it, or give another --out"
        )


def open_rows(path: Path) -> RowFile:
    """A RowFile of the kind that the suffix says."""
    if path.suffix == ".parquet":
        return _Parquet(path)
    if path.suffix == ".jsonl":
        return _Jsonl(path)
    raise OutputError(f"{path}: found the suffix {path.suffix!r}, wanted {' or '.join(SUFFIXES)}")


def write_text(path: Path, text: str) -> None:
    """Write a file and make it last."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Parquet:
    """With the schema of its kind, so that a file without rows has one as well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = []
        self._writer: Any = None

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._write_group()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._write_group()
        self._writer.close()
        _sync(self._path)

    def _write_group(self) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = _schema("messages" in self._rows[0] if self._rows else False)
        table = pyarrow.Table.from_pylist(self._rows, schema=schema)
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, schema)
        self._writer.write_table(table)
        self._rows = []


def _schema(conversations: bool) -> Any:
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    info = pyarrow.struct([("split", text), ("index", number), ("file", text)])
    if conversations:
        fields = [("data_source", text), ("messages", messages), ("extra_info", info)]
    else:
        judge = pyarrow.struct([("style", text), ("ground_truth", text)])
        fields = [("data_source", text), ("prompt", messages), ("ability", text)]
        fields += [("reward_model", judge), ("extra_info", info)]
    return pyarrow.schema(fields)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
