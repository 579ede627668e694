"""What was answered, on disk: one JSON line a problem, written chunk by chunk.

    evaluation/<set>/greedy.jsonl      sampled.jsonl               responses, scores
    evaluation/<set>/greedy.json       sampled.json                the options they were made with
    evaluation/<set>/sampled.prm.jsonl sampled.prm.json            PRM scores, while they are made

They are written as `runtime/line_files.py` says, so that a continued evaluation has the figures of
one that was never killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from megatron_prime.runtime.line_files import (
    RecordsError,
    append,
    changes,
    note,
    read_chunks,
    write_whole,
)

AGGREGATES = ("min", "sum", "last")


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

        Raises RecordsError if it was made with other options.
        """
        self.path, self.total = path, total
        if changed := changes(path, options):
            raise RecordsError(
                f"{path} was made with other options; set them back to continue it, remove "
                f"{path.parent} to start anew, or take another run.folder:\n" + "\n".join(changed)
            )
        self.found = read_chunks(path, _RECORD, chunk, total)

    def append(self, records: Sequence[Record]) -> None:
        """Add a chunk; it is on the disk when this returns."""
        append(self.path, [_RECORD.dump_json(record) for record in records])
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
            note(self._path, options)
        scores = [r.prm for record in records.found for r in record.responses]
        self.complete = all(score is not None for score in scores)
        self.found: list[Scored] = []
        if not self.complete:
            self.found = read_chunks(self._path, _SCORED, chunk, records.total)

    def append(self, scored: Sequence[Scored]) -> None:
        """Add a chunk; it is on the disk when this returns."""
        append(self._path, [_SCORED.dump_json(item) for item in scored])
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
