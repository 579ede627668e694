"""Reading rows of jsonl and parquet files: every malformed row is reported at once, with its place.

A data set is wrong in many rows or in none; whoever mends it wants the list, not its first item.
The parser of a row raises RowError for what it can't use; `read_rows` gathers these into one
DataError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_prime.errors import RunError

SHOWN_PROBLEMS = 20

Row = dict[str, Any]
Parsed = TypeVar("Parsed")
Field = TypeVar("Field", str, list[Any], dict[str, Any])


class DataError(RunError, ValueError):
    """A data file that can't be used; the message lists what is wrong with it, and where."""


class RowError(ValueError):
    """A row that can't be used: what was found and what was wanted."""


def read_rows(path: Path, parse: Callable[[int, Row], Parsed]) -> list[Parsed]:
    """All rows of `path`, each through `parse(number, row)`; numbers from 0, with blank lines.

    Raises DataError if the file is missing, empty or neither .jsonl nor .parquet, and one for all
    rows together that are not objects or whose parser raised RowError (lines count from 1 there, as
    in an editor).
    """
    parsed: list[Parsed] = []
    problems: list[str] = []
    count = 0
    for number, place, row in scan_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            parsed.append(parse(number, row))
        except RowError as error:  # survived until all other rows are looked at
            count += 1
            if count <= SHOWN_PROBLEMS:
                problems.append(f"  {place}: {error}")
    if count:
        raise malformed(path, problems, count)
    if not parsed:
        raise DataError(f"{path} is empty; wanted at least one row")
    return parsed


def scan_rows(path: Path) -> Iterator[tuple[int, str, Row | RowError]]:
    """Number, place ("line 3", "row 2") and content of each row, one after the other.

    The content is a RowError where the row isn't an object. Raises DataError if the file is missing
    or neither .jsonl nor .parquet.
    """
    for number, row in _open_rows(path):
        if isinstance(row, dict):
            yield number, f"row {number}", row
            continue
        try:
            content: Row | RowError = _json_object(row)
        except RowError as error:  # the reader decides what it means for the file
            content = error
        yield number, f"line {number + 1}", content


def malformed(path: Path, problems: Sequence[str], count: int) -> DataError:
    """One error for `count` malformed rows, of which `problems` describes the first ones."""
    more = [f"  … and {count - len(problems)} more"] if count > len(problems) else []
    return DataError("\n".join([f"{path}: malformed rows: {count}", *problems, *more]))


def field(row: Row, name: str, kind: type[Field]) -> Field:
    """`row[name]`, which must be a `kind` and not empty; else RowError."""
    value = row.get(name)
    if isinstance(value, kind) and value:
        return value
    raise RowError(f"{name}: found {_found(row, name)}, wanted a non-empty {kind.__name__}")


def one_of(row: Row, name: str, choices: tuple[str, ...]) -> str:
    """`row[name]`, which must be one of `choices`; else RowError."""
    for choice in choices:
        if row.get(name) == choice:
            return choice
    wanted = " or ".join(map(repr, choices))
    raise RowError(f"{name}: found {_found(row, name)}, wanted {wanted}")


def _open_rows(path: Path) -> Iterator[tuple[int, Row | bytes]]:
    """Numbered rows: undecoded lines of jsonl, or objects of parquet."""
    if not path.is_file():
        raise DataError(f"no file {path}; give the path of a .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        return _jsonl_lines(path)
    if path.suffix == ".parquet":
        return enumerate(_parquet_rows(path))
    raise DataError(f"{path}: found the suffix {path.suffix!r}, wanted .jsonl or .parquet")


def _jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file) if line.strip())


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _json_object(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON or not UTF-8
        raise RowError(f"found {_shorten(line)}, wanted a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise RowError(f"found {_shorten(row)}, wanted a JSON object")
    return row


def _found(row: Row, name: str) -> str:
    return _shorten(row[name]) if name in row else "nothing"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
