"""Files that grow by whole chunks of JSON lines, so that a killed command can go on.

    greedy.jsonl    one record a line
    greedy.json     the options it was made with, or wherever who writes it says

A chunk is one write that reaches the disk before the next chunk begins. After a kill a last, broken
chunk is cut off and made again, in the same company: so a continued file is that of a command which
was never killed. With other options the records would be another model's, and are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_prime.errors import RunError


class RecordsError(RunError, ValueError):
    """Records that can't be continued or read; the message names the file and what to do."""


def changes(path: Path, options: Mapping[str, Any], noted: Path | None = None) -> list[str]:
    """What differs from the options that `path` was made with, a line each; notes those of a new
    file, in `noted` (not given: beside it, as .json).

    Raises RecordsError where something else is noted there.
    """
    noted = noted or path.with_suffix(".json")
    if not noted.exists() and not path.exists():
        note(path, options, noted)
    before = _noted(noted) if noted.exists() else {}
    now = json.loads(json.dumps(options))
    return [
        f"  {name}: found {now.get(name)!r}, made with {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def note(path: Path, options: Mapping[str, Any], noted: Path | None = None) -> None:
    """Write down the options that `path` is made with, where `changes` looks for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(noted or path.with_suffix(".json"), json.dumps(options, indent=1).encode())


def _noted(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_bytes())
    except ValueError:  # no JSON, no UTF-8
        options = None
    if not isinstance(options, dict):
        raise RecordsError(
            f"{path}: found no table of options, wanted those that the records beside it were made "
            "with; bring it back from a copy, or give the records another place"
        )
    return options


def write_whole(path: Path, content: bytes) -> None:
    """Never half a file of that name."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def append(path: Path, lines: Sequence[bytes]) -> None:
    """Add lines; they are on the disk when this returns."""
    with path.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_chunks(path: Path, adapter: TypeAdapter[Any], chunk: int, total: int) -> list[Any]:
    """The items of whole chunks, or all `total`; what follows them is cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines)
    kept = total if whole >= total else whole // chunk * chunk
    if kept < len(lines):
        write_whole(path, b"".join(lines[:kept]))
    try:
        return [adapter.validate_json(line) for line in lines[:kept]]
    except ValidationError as error:
        raise RecordsError(
            f"{path}: a line is no record ({error.error_count()} faults); remove it to start "
            "anew, or bring it back from a copy"
        ) from error
