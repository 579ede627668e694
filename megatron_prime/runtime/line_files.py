"""Files that grow by whole chunks of JSON lines, so that a killed command can go on.

    scores.jsonl    one record a line
    scores.json     the options it was made with

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


def changes(path: Path, options: Mapping[str, Any]) -> list[str]:
    """What differs from the options that `path` was made with, a line each; notes those of a new
    file."""
    noted = path.with_suffix(".json")
    if not noted.exists() and not path.exists():
        note(path, options)
    before = json.loads(noted.read_text()) if noted.exists() else {}
    now = json.loads(json.dumps(options))
    return [
        f"  {name}: found {now.get(name)!r}, made with {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def note(path: Path, options: Mapping[str, Any]) -> None:
    """Write down the options that `path` is made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".json"), json.dumps(options, indent=1).encode())


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
