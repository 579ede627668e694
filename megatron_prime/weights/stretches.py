"""Stretches of tensors from file to file, through a buffer of 256 KiB.

Most of a conversion moves bytes: a tensor's rows lie together in either form. So they are read in
blocks that stay in the processor's cache while their sum is made and they are written; how large
the tensor is does not matter. Columns (the layers that tensor parallelism splits by input) don't
lie together: such a tensor is held in memory while it is cut or put together, and all workers share
a budget for that. Only another type of numbers needs torch, a block at a time.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime.errors import WeightsError
from megatron_prime.weights.dtypes import ITEMSIZE

BLOCK = 1 << 18  # bytes; for larger ones Linux looks for larger free pages, at times for long
_HUGE = 1 << 22  # bytes; two pages


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Rows and columns of a tensor that lie together in a file, in row-major order."""

    row: int
    rows: int
    col: int
    cols: int
    path: Path
    start: int  # bytes


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where a tensor lies; one column where it has one dimension."""

    dtype: str
    rows: int
    cols: int
    extents: tuple[Extent, ...]  # by row

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        return self.cols * ITEMSIZE[self.dtype]

    @property
    def wide(self) -> bool:
        """Whether all rows lie in one piece."""
        return all(extent.cols == self.cols for extent in self.extents)


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


class Stretches:
    """An open tensor. What is yielded is overwritten by the next; let none of it outlive this."""

    def __init__(self, tensor: FileTensor, held: bool) -> None:
        self.tensor = tensor
        self._buffer = memoryview(bytearray(min(BLOCK, max(tensor.rows * tensor.pitch, 1))))
        self._whole: Any = None
        if held:
            self._whole = whole(tensor)

    def blocks(self, row: int, rows: int, col: int = 0, cols: int | None = None) -> Iterator[Any]:
        """The bytes of rows `row` and following, of all columns or some, in row-major order."""
        if self._whole is not None:
            itemsize = ITEMSIZE[self.tensor.dtype]
            last = self.tensor.pitch if cols is None else (col + cols) * itemsize
            return self._from_memory(row, rows, col * itemsize, last)
        assert cols is None or cols == self.tensor.cols, "columns are cut from a held tensor"
        return self._from_files(row, rows)

    def _from_files(self, row: int, rows: int) -> Iterator[Any]:
        pitch = self.tensor.pitch
        for extent in self.tensor.extents:
            first = max(extent.row, row)
            last = min(extent.row + extent.rows, row + rows)
            if first < last:
                start = extent.start + (first - extent.row) * pitch
                yield from _read(extent.path, start, (last - first) * pitch, self._buffer)

    def _from_memory(self, row: int, rows: int, first: int, last: int) -> Iterator[Any]:
        import numpy as np

        width = last - first
        some = max(len(self._buffer) // width, 1)
        room = self._buffer if some * width <= len(self._buffer) else bytearray(width)
        for at in range(row, row + rows, some):
            count = min(some, row + rows - at)
            block = np.frombuffer(room, np.uint8, count * width).reshape(count, width)
            np.copyto(block, self._whole[at : at + count, first:last])
            yield block.data.cast("B")

    def close(self) -> None:
        """Let go of the memory."""
        self._whole = None


def whole(tensor: FileTensor) -> Any:
    """All of a tensor, as a numpy array of bytes [rows, bytes of a row] in memory of its own."""
    import numpy as np

    itemsize = ITEMSIZE[tensor.dtype]
    held = np.frombuffer(_memory(tensor.rows * tensor.pitch), np.uint8)
    held = held.reshape(tensor.rows, tensor.pitch)
    for extent in tensor.extents:
        first, width = extent.col * itemsize, extent.cols * itemsize
        some = max(BLOCK // width, 1) * width  # whole rows
        room, row = memoryview(bytearray(min(some, extent.rows * width))), extent.row
        for block in _read(extent.path, extent.start, extent.rows * width, room):
            lines = np.frombuffer(block, np.uint8).reshape(-1, width)
            held[row : row + len(lines), first : first + width] = lines
            row += len(lines)
    return held


def part(tensor: FileTensor, rows: slice, cols: slice) -> Any:
    """Some rows and columns of a tensor, as a numpy array of bytes; no others are read."""
    import numpy as np

    itemsize = ITEMSIZE[tensor.dtype]
    held = np.empty((rows.stop - rows.start, (cols.stop - cols.start) * itemsize), np.uint8)
    for extent in tensor.extents:
        top, bottom = max(extent.row, rows.start), min(extent.row + extent.rows, rows.stop)
        left, right = max(extent.col, cols.start), min(extent.col + extent.cols, cols.stop)
        if top < bottom and left < right:
            there = (extent.rows, extent.cols * itemsize)
            lines = np.memmap(extent.path, np.uint8, "r", extent.start, there)
            held[
                top - rows.start : bottom - rows.start,
                (left - cols.start) * itemsize : (right - cols.start) * itemsize,
            ] = lines[
                top - extent.row : bottom - extent.row,
                (left - extent.col) * itemsize : (right - extent.col) * itemsize,
            ]
    return held


@contextmanager
def opened(tensor: FileTensor, cut: bool, budget: Budget) -> Iterator[Stretches]:
    """A tensor to read, of which columns are wanted if `cut`."""
    held = cut or not tensor.wide
    with budget.take(tensor.rows * tensor.pitch if held else 0):
        stretches = Stretches(tensor, held)
        try:
            yield stretches
        finally:
            stretches.close()


def _read(path: Path, start: int, nbytes: int, buffer: memoryview) -> Iterator[memoryview]:
    """A stretch of a file in full buffers, the last one but for the rest."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while nbytes:
            block = buffer[: min(nbytes, len(buffer))]
            filled = 0
            while filled < len(block):
                if not (got := file.readinto(block[filled:])):
                    raise WeightsError(f"{path} is cut short; copy it again")
                filled += got
            nbytes -= filled
            yield block


def _memory(nbytes: int) -> Any:
    """In huge pages where there are any: each fault of 4 KiB takes as long as reading them."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def converted(blocks: Iterator[Any], name: str, before: str, after: str) -> Iterator[Any]:
    """Blocks of numbers in another type. WeightsError where a finite one would become infinite."""
    if before == after:
        yield from blocks
        return
    import torch

    for block in blocks:
        found = torch.frombuffer(block, dtype=getattr(torch, before))
        made = found.to(getattr(torch, after))
        if bool((made.isinf() & found.isfinite()).any()):
            raise WeightsError(f"{name} has values beyond the range of {after}; take --dtype fp32")
        yield made.view(torch.uint8).numpy().data
