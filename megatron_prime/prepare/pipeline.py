"""From input files to a folder of training files: read → screen → clean → fits → unique → split.

Every stage sees an item once and in the order of the input, and keeps at most hashes of it, so that
memory doesn't grow with the texts. The first of two equal problems stays. Which split an item goes
to depends on the seed and its own text alone: more data, or another filter, moves none from
validation to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_prime.data.rows import SHOWN_PROBLEMS, DataError, Row, malformed
from megatron_prime.prepare.duplicates import Seen
from megatron_prime.prepare.items import Dropped, Item
from megatron_prime.prepare.output import new_folder, open_rows, write_text
from megatron_prime.prepare.overlap import Evaluation
from megatron_prime.prepare.sources import Parser, detect, items
from megatron_prime.prepare.summary import Report
from megatron_prime.prepare.text import digest, normal_form

_BATCH = 512  # items screened together: enough to keep the grader's workers busy

Screen = Callable[[Sequence[Item]], Sequence[Item | Dropped]]
Finish = Callable[[Item, str], Row | Dropped]  # item and split → row of the training file
Notify = Callable[[int], None]  # gets the number of rows read so far


@dataclass(frozen=True, slots=True)
class Task:
    """What to prepare, how, and where to."""

    inputs: tuple[Path, ...]
    out: Path
    formats: Mapping[str, Parser]
    screen: Screen
    finish: Finish
    evaluation: Evaluation
    format: str | None = None  # of all inputs; None finds it out for each
    suffix: str = ".jsonl"  # of the files in `out`
    near_duplicates: bool = True
    drop_malformed: bool = False  # count them; else they are an error, all at once
    validation: float = 0.0  # share of the items that goes to the validation file
    seed: int = 0


def prepare(task: Task, options: Mapping[str, Any], notify: Notify = lambda rows: None) -> Report:
    """Write train, validation (if a share is wanted), report.md and report.json into `task.out`.

    Raises DataError for unreadable files, for malformed rows unless they are to be dropped, and if
    nothing is left; OutputError if the folder can't be made. Then there is no folder.
    """
    parsers = {path: _parser(task, path) for path in task.inputs}
    report = Report(options)
    with new_folder(task.out) as folder:
        splits = ("train", "validation") if task.validation > 0 else ("train",)
        files = {split: open_rows(folder / f"{split}{task.suffix}") for split in splits}
        seen = Seen(task.near_duplicates)
        for found in _screened(task, parsers, report, notify):
            made = _finish(task, seen, found)
            if isinstance(made, Dropped):
                report.drop(made)
            else:
                item, split, row = made
                report.keep(item, split)
                files[split].write(row)
        for file in files.values():
            file.close()
        report.evaluation(task.evaluation.problems, task.evaluation.hit, task.evaluation.phrases)
        if not report.kept:
            raise DataError("\n".join(["found no row that all rules keep:", *report.table()]))
        write_text(folder / "report.json", report.as_json())
        write_text(folder / "report.md", report.as_markdown())
    return report


def split_of(text: str, seed: int, validation: float) -> str:
    """`validation` for that share of all texts, else `train`."""
    return "validation" if digest(f"{seed}\n{normal_form(text)}") < validation * 2**64 else "train"


def _parser(task: Task, path: Path) -> Parser:
    return task.formats[task.format or detect(path, dict(task.formats))]


def _screened(
    task: Task, parsers: Mapping[Path, Parser], report: Report, notify: Notify
) -> Iterator[Item | Dropped]:
    """All items that can be read, screened in batches."""
    read = 0
    stream = _read(task, parsers, report)
    while batch := list(islice(stream, _BATCH)):
        yield from task.screen(batch)
        read += len(batch)
        notify(read)


def _read(task: Task, parsers: Mapping[Path, Parser], report: Report) -> Iterator[Item]:
    """All well-formed items; one DataError for the others of a file, unless they are dropped."""
    for path, parser in parsers.items():
        problems: list[str] = []
        count = 0
        for _, place, item in items(path, parser):
            if isinstance(item, Item):
                if not count:  # else the file is only read to the end for its other problems
                    yield item
            elif task.drop_malformed:
                why = str(item)
                report.drop(Dropped("malformed", why, path.name, place, path.stem, ""))
            else:
                count += 1
                if count <= SHOWN_PROBLEMS:
                    problems.append(f"  {place.removeprefix(path.name + ' ')}: {item}")
        if count:
            error = malformed(path, problems, count)
            raise DataError(f"{error}\nmend them, or drop and count them with --malformed drop")


def _finish(task: Task, seen: Seen, found: Item | Dropped) -> tuple[Item, str, Row] | Dropped:
    """The split and row of an item that is clean, short enough and new."""
    if isinstance(found, Item):
        found = task.evaluation.check(found)
    if isinstance(found, Dropped):
        return found
    split = split_of(found.text, task.seed, task.validation)
    row = task.finish(found, split)
    if isinstance(row, Dropped):
        return row
    new = seen.check(found)  # last: an item that is dropped must not take its twin along
    return new if isinstance(new, Dropped) else (new, split, row)
