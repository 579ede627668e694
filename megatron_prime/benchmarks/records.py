"""What was answered, on disk: one JSON line a problem, written chunk by chunk.

    evaluation/<set>/greedy.jsonl      sampled.jsonl               responses, scores
    evaluation/<set>/greedy.json       sampled.json                the options they were made with
    evaluation/<set>/sampled.prm.jsonl sampled.prm.json            PRM scores, while they are made

A chunk is one write that reaches the disk before the next chunk begins. After a kill a last, broken
chunk is cut off and asked again, in the same company: so a continued evaluation has the figures of
one that was never killed. With other options the records would be another model's, and are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_prime.errors import RunError

AGGREGATES = ("min", "sum", "last")


class EvaluationError(RunError, ValueError):
    """Records that can't be continued or read; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class PrmScores:
    """A response's token rewards beta * log(prm / ref), in three ways one number."""

    min: float
    sum: float
    last: float


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a problem."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    score: float  # the verifier's
    answer: str | None  # its vote, `answers.answer_of`
    prm: PrmScores | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A problem with its answers."""

    id: str
    row: int  # in the set's file
    prompt_hash: str
    ground_truth: str
    responses: tuple[Response, ...]
    checker_failures: int


@dataclass(frozen=True, slots=True)
class Scored:
    """PRM scores of a problem's responses."""

    id: str
    scores: tuple[PrmScores, ...]


_RECORD, _SCORED = TypeAdapter(Record), TypeAdapter(Scored)


class Records:
    """The file of one set's answers of one kind; for rank 0 alone."""

    def __init__(self, path: Path, options: Mapping[str, Any], chunk: int, total: int) -> None:
        """Continue `path`, which will have `total` records, or begin it.

        Raises EvaluationError if it was made with other options.
        """
        self.path, self.total = path, total
        if changed := changes(path, options):
            raise EvaluationError(
                f"{path} was made with other options; set them back to continue it, remove "
                f"{path.parent} to start anew, or take another run.folder:\n" + "\n".join(changed)
            )
        self.found = _read(path, _RECORD, chunk, total)

    def append(self, records: Sequence[Record]) -> None:
        """Add a chunk; it is on the disk when this returns."""
        _append(self.path, [_RECORD.dump_json(record) for record in records])
        self.found += records

    def rewrite(self, records: Sequence[Record]) -> None:
        """Put `records` in place of what was there."""
        write_whole(self.path, b"".join(_RECORD.dump_json(record) + b"\n" for record in records))
        self.found = list(records)


class Scores:
    """PRM scores beside the file of the answers, and at last in it."""

    def __init__(self, records: Records, options: Mapping[str, Any], chunk: int) -> None:
        """Continue or begin; what another PRM has scored is dropped, and said to be."""
        self._records = records
        self._path = records.path.with_suffix(".prm.jsonl")
        if changed := changes(self._path, options):
            told = "\n".join(changed)
            print(f"{records.path}: PRM scores are made anew, for others:\n{told}", flush=True)
            self._path.unlink(missing_ok=True)
            # Noted last: a kill before it leaves no score that could pass for the new PRM's.
            records.rewrite(
                [_with(record, [None] * len(record.responses)) for record in records.found]
            )
            _note(self._path, options)
        scores = [r.prm for record in records.found for r in record.responses]
        self.complete = all(score is not None for score in scores)
        self.found: list[Scored] = []
        if not self.complete:
            self.found = _read(self._path, _SCORED, chunk, records.total)

    def append(self, scored: Sequence[Scored]) -> None:
        """Add a chunk; it is on the disk when this returns."""
        _append(self._path, [_SCORED.dump_json(item) for item in scored])
        self.found += scored

    def merge(self) -> None:
        """Put all scores into the records, in one go, and drop the file they were in."""
        by_id = {item.id: item.scores for item in self.found}
        self._records.rewrite([_with(record, by_id[record.id]) for record in self._records.found])
        self._path.unlink(missing_ok=True)
        self.complete = True


def _with(record: Record, scores: Sequence[PrmScores | None]) -> Record:
    """The record with other PRM scores."""
    pairs = zip(record.responses, scores, strict=True)
    return replace(record, responses=tuple(replace(r, prm=score) for r, score in pairs))


def changes(path: Path, options: Mapping[str, Any]) -> list[str]:
    """What differs from the options that `path` was made with, a line each; notes those of a new
    file."""
    noted = path.with_suffix(".json")
    if not noted.exists() and not path.exists():
        _note(path, options)
    before = json.loads(noted.read_text()) if noted.exists() else {}
    now = json.loads(json.dumps(options))
    return [
        f"  {name}: found {now.get(name)!r}, made with {before.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _note(path: Path, options: Mapping[str, Any]) -> None:
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


def _append(path: Path, lines: Sequence[bytes]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, adapter: TypeAdapter[Any], chunk: int, total: int) -> list[Any]:
    """The items of whole chunks, or all `total`; what follows them is cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines)
    kept = total if whole >= total else whole // chunk * chunk
    if kept < len(lines):
        write_whole(path, b"".join(lines[:kept]))
    try:
        return [adapter.validate_json(line) for line in lines[:kept]]
    except ValidationError as error:
        raise EvaluationError(
            f"{path}: a line is no record ({error.error_count()} faults); remove {path.parent} to "
            "start anew, or bring the file back from a copy"
        ) from error
