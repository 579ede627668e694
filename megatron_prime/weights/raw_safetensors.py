"""Safetensors as plain bytes, one tensor at a time, whatever the size of the files.

A file is a length, a table of names, types, sizes and places, and the tensors' bytes. Mapped files
would count as this process's memory, page by page, until all of the model is in; here a tensor is
read into its own memory and let go, and a file is written in the order of its table.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prime.weights.safetensors_io import HfCheckpoint, WeightsError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FLAGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_HUGE = 1 << 22  # bytes; two pages
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    dtype: torch.dtype
    size: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class HfFiles(HfCheckpoint):
    """The tensors of a Hugging Face directory; nothing of them stays in memory."""

    def _file(self, file: str) -> dict[str, Stored]:
        if file not in self._open:
            self._open[file] = read_table(self.hf_dir / file)
        table: dict[str, Stored] = self._open[file]
        return table

    def stored(self, name: str) -> Stored:
        """Type, size and place of a tensor."""
        file = self.file_of[name]
        if name not in self._file(file):
            raise WeightsError(
                f"{self.hf_dir / file}: no tensor {name}, which the index places there"
            )
        return self._file(file)[name]

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self.stored(name).size

    def whole(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        stored = self.stored(name)
        tensor = empty(stored.size, stored.dtype)
        read_into(tensor, self.hf_dir / self.file_of[name], stored.start)
        return tensor

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """A stretch of a tensor, in the file's type."""
        return self.whole(name)[part]


def read_table(path: Path) -> dict[str, Stored]:
    """Where the tensors of a file lie. WeightsError when it is absent, damaged or cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = os.fstat(file.fileno()).st_size
            if 8 + length > found:
                raise WeightsError(
                    f"{path} is damaged or cut short: {found:,} bytes, too few for "
                    "its own table; download or copy it again"
                )
            table = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is in the index but not there; download it") from error
    except ValueError as error:  # no JSON, no UTF-8
        raise WeightsError(f"{path} is damaged ({error}); download or copy it again") from error
    table.pop("__metadata__", None)
    wanted = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    if found != wanted:
        raise WeightsError(
            f"{path} is damaged or cut short: {found:,} bytes, wanted {wanted:,}; "
            "download or copy it again"
        )
    for name, entry in table.items():
        if entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{path}: {name} is {entry['dtype']}, wanted one of {list(DTYPES)}; "
                "take the checkpoint in bf16"
            )
    return {
        name: Stored(
            DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in table.items()
    }


def table_of(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """The beginning of a file that holds `tensors` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, size in tensors:
        start, end = end, end + prod(size) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, in huge pages where it is large and the system has them.

    Each tensor is used once, and a fault for each 4 KiB would take as long as reading it.
    """
    nbytes = prod(size) * dtype.itemsize
    if nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(size), dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(size))


def read_into(tensor: Tensor, path: Path, start: int) -> None:
    """Fill a contiguous tensor from a file. WeightsError when the file ends before."""
    view = bytes_of(tensor)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while view:
            if not (got := file.readinto(view)):
                raise WeightsError(f"{path} is cut short; copy it again")
            view = view[got:]
