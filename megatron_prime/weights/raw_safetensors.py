"""Safetensors as plain bytes, without torch: where tensors lie in files, and the tables of files.

A file is a length, a table of names, types, sizes and places, and the tensors' bytes. A directory
is one `model.safetensors`, or several files and an index that says which tensor is where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_prime.errors import WeightsError
from megatron_prime.weights.dtypes import ITEMSIZE, SAFETENSORS

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
_MEND = "download or copy it again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    size: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class HfFiles:
    """The tensors of a Hugging Face directory; nothing of them is in memory."""

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = hf_dir
        self._tables: dict[str, dict[str, Stored]] = {}
        self.file_of = files_of(hf_dir)  # by tensor name

    def stored(self, name: str) -> Stored:
        """Type, size and place of a tensor."""
        file = self.file_of[name]
        if name not in self._table(file):
            raise WeightsError(
                f"{self.hf_dir / file}: no tensor {name}, which the index places there"
            )
        return self._table(file)[name]

    def check(self, wanted: Mapping[str, tuple[int, ...]], may_ignore: Iterable[str] = ()) -> None:
        """WeightsError unless there are exactly the `wanted` tensors, in the index and the files.

        Surplus tensors are an error too (they mean another architecture), but for `may_ignore`.
        """
        found = {name: self.stored(name).size for name in self.file_of}
        for file in sorted(set(self.file_of.values())):
            for name, stored in self._table(file).items():
                found.setdefault(name, stored.size)
        check_names(self.hf_dir, found, wanted, may_ignore)

    def _table(self, file: str) -> dict[str, Stored]:
        if file not in self._tables:
            self._tables[file] = read_table(self.hf_dir / file)
        return self._tables[file]


def files_of(hf_dir: Path) -> dict[str, str]:
    """The file of each tensor. WeightsError when there is no index and no single file."""
    index = hf_dir / INDEX
    if not index.exists():
        if not (hf_dir / SINGLE).exists():
            raise WeightsError(f"{hf_dir}: found neither {SINGLE} nor {INDEX}")
        return dict.fromkeys(read_table(hf_dir / SINGLE), SINGLE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # cut, or something else
        raise WeightsError(
            f"{index} is damaged or no index ({type(error).__name__}: {error}); {_MEND}"
        ) from error


def check_names(
    hf_dir: Path,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    may_ignore: Iterable[str] = (),
) -> None:
    """WeightsError unless `found` are the `wanted` tensors, each in its shape."""
    missing = wanted.keys() - found.keys()
    surplus = found.keys() - wanted.keys() - set(may_ignore)
    wrong = [
        f"{name} is {found[name]}, wanted {size}"
        for name, size in wanted.items()
        if name in found and found[name] != size
    ]
    for what, names in (("lacks", missing), ("has unknown", surplus), ("has wrong", wrong)):
        if names:
            some = ", ".join(sorted(names)[:4]) + (" …" if len(names) > 4 else "")
            raise WeightsError(
                f"{hf_dir} {what} tensors ({len(names)}): {some}; "
                "do config.json and safetensors belong together?"
            )


def read_table(path: Path) -> dict[str, Stored]:
    """Where the tensors of a file lie. WeightsError when it is absent, damaged or cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = os.fstat(file.fileno()).st_size
            if 8 + length > found:
                raise WeightsError(
                    f"{path} is damaged or cut short: {found:,} bytes, too few for "
                    f"its own table; {_MEND}"
                )
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
        if found != 8 + length + end:
            raise WeightsError(
                f"{path} is damaged or cut short: {found:,} bytes, wanted {8 + length + end:,}; "
                f"{_MEND}"
            )
        return _placed(path, table, 8 + length)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is in the index but not there; download it") from error
    except WeightsError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # no JSON, no table
        raise WeightsError(
            f"{path} is damaged ({type(error).__name__}: {error}); {_MEND}"
        ) from error


def _placed(path: Path, table: dict[str, Any], base: int) -> dict[str, Stored]:
    """The tensors of a table, whose bytes must follow each other without a gap."""
    at, placed = 0, {}
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), size = entry["data_offsets"], tuple(entry["shape"])
        if entry["dtype"] not in SAFETENSORS:
            raise WeightsError(
                f"{path}: {name} is {entry['dtype']}, wanted one of {list(SAFETENSORS)}; "
                "take the checkpoint in bf16"
            )
        dtype = SAFETENSORS[entry["dtype"]]
        if start != at or end - start != prod(size) * ITEMSIZE[dtype]:
            raise WeightsError(
                f"{path} is damaged: {name} of {size} in {entry['dtype']} lies at {start:,} to "
                f"{end:,}, wanted {at:,} to {at + prod(size) * ITEMSIZE[dtype]:,}; {_MEND}"
            )
        at = end
        placed[name] = Stored(dtype, size, base + start)
    return placed


def table_of(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> bytes:
    """The beginning of a file that holds `tensors` (name, type, size) in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, size in tensors:
        start, end = end, end + prod(size) * ITEMSIZE[dtype]
        table[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text
