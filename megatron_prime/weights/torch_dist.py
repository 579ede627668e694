"""Megatron's distributed checkpoints (`torch_dist`), without any ranks and without torch.

A checkpoint knows no layout. Each parameter of the whole model has a key, the layers' stacked under
one, and lies there in chunks with their offsets: cut as the ranks that wrote it had cut it. A
reader takes whatever chunks overlap with what it wants. So a converter may write and read
parameters one by one; how it cuts them (`tp`) only decides what each rank must read later, for a
chunk is always read whole. Each chunk is a small archive of `torch.save` within a larger file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from megatron_prime.errors import WeightsError
from megatron_prime.weights import archive, dist_metadata
from megatron_prime.weights.dist_metadata import Piece
from megatron_prime.weights.dtypes import ITEMSIZE
from megatron_prime.weights.layout import Layout, row_runs
from megatron_prime.weights.names import Entry, disk_key, entries
from megatron_prime.weights.shape import ModelShape, padded
from megatron_prime.weights.stretches import Extent, FileTensor

# States beside the weights that some layer of Megatron's asks for; empty but in FP8 training.
_LAYER_STATES = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_FINAL_STATE = "decoder.final_layernorm._extra_state/shard_0_1"
WEIGHTS = ("decoder.", "embedding.", "output_layer.")  # what keys of weights begin with


class Rect(NamedTuple):
    """Rows and columns of a parameter; one column where it has one dimension."""

    row: int
    rows: int
    col: int
    cols: int


def fused_size(
    layout: Layout, hf_sizes: Sequence[tuple[int, ...]], shape: ModelShape
) -> tuple[int, ...]:
    """The size of a parameter of the whole model."""
    rows = shape.padded_vocab_size if layout is Layout.VOCAB else sum(size[0] for size in hf_sizes)
    return (rows, *hf_sizes[0][1:])


def chunks_of(layout: Layout, size: tuple[int, ...], tp: int) -> list[Rect]:
    """A parameter of `size` in the chunks that `tp` ranks would save, rank by rank.

    Gate and up are chunks of their own, as Megatron's ranks save them.
    """
    rows, cols = size[0], prod(size[1:])
    if layout is Layout.WHOLE:
        return [Rect(0, rows, 0, cols)]
    if layout is Layout.COLUMNS:
        return [Rect(0, rows, rank * cols // tp, cols // tp) for rank in range(tp)]
    if layout is Layout.GATE_UP:
        each = rows // 2 // tp
        return [
            Rect((above * tp + rank) * each, each, 0, cols)
            for rank in range(tp)
            for above in (0, 1)
        ]
    return [Rect(rank * rows // tp, rows // tp, 0, cols) for rank in range(tp)]


class DistCheckpoint:
    """The weights in a directory of Megatron's; optimizer states may be there, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = dist_metadata.read(folder)
        self.tensors, self._ends = table.tensors, table.ends
        self._pieces: dict[tuple[str, int | None], list[tuple[str, Piece]]] = {}
        for key, stored in self.tensors.items():
            for file, piece in stored.pieces:
                assert piece.offsets is not None
                layer = piece.offsets[0] if key.startswith("decoder.layers.") else None
                self._pieces.setdefault((key, layer), []).append((file, piece))

    def check(self, shape: ModelShape, hf_sizes: dict[str, tuple[int, ...]]) -> None:
        """WeightsError unless the weights are those of `shape` and all files have their length."""
        wanted: dict[str, tuple[int, ...]] = {}
        for entry in entries(shape):
            key, layer = disk_key(entry.megatron)
            size = fused_size(entry.layout, [hf_sizes[name] for name in entry.hf], shape)
            wanted[key] = size if layer is None else (shape.num_layers, *size)
            if entry.layout is Layout.VOCAB and key in self.tensors:  # padded for another layout
                rows = self.tensors[key].size[0]
                if _is_padding(rows, shape.vocab_size):
                    wanted[key] = (rows, *size[1:])
        here = {key for key in self.tensors if key.startswith(WEIGHTS)}
        problems = {
            "lacks": sorted(wanted.keys() - here),
            "has unknown": sorted(here - wanted.keys()),
            "has wrong": [
                f"{key} is {self.tensors[key].size}, wanted {size}"
                for key, size in wanted.items()
                if key in here and self.tensors[key].size != size
            ],
        }
        for what, names in problems.items():
            if names:
                some = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
                raise WeightsError(
                    f"{self.folder} {what} tensors ({len(names)}): {some}; do "
                    "config.json and checkpoint belong together?"
                )
        self.check_files()

    def check_files(self) -> None:
        """WeightsError when a file is absent or too short for what lies in it."""
        for name, end in sorted(self._ends.items()):
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found < end:
                raise WeightsError(
                    f"{path} is absent or cut short: {found:,} bytes, wanted "
                    f"{end:,}; bring it back from a copy"
                )

    def dtype(self, name: str) -> str:
        """The stored type of a parameter of the table."""
        return self.tensors[disk_key(name)[0]].dtype

    def tensors_of(
        self, entry: Entry, hf_sizes: Sequence[tuple[int, ...]], shape: ModelShape
    ) -> list[FileTensor]:
        """Where the Hugging Face tensors of an entry lie in the chunks of its parameter."""
        key, layer = disk_key(entry.megatron)
        dtype, lead = self.dtype(entry.megatron), 0 if layer is None else 1
        runs = row_runs(entry.layout, [size[0] for size in hf_sizes], shape)
        extents: list[list[Extent]] = [[] for _ in hf_sizes]
        for file, piece in self._pieces.get((key, layer), []):
            assert piece.offsets is not None
            offsets, sizes = piece.offsets[lead:], piece.sizes[lead:]
            if lead and piece.sizes[0] != 1:
                raise WeightsError(f"{self.folder}: a chunk of {key} holds several layers")
            rect = Rect(offsets[0], sizes[0], (*offsets, 0)[1], prod(sizes[1:]))
            path, start = self.folder / file, None
            for run in runs:
                row = max(run.fused, rect.row)
                rows = min(run.fused + run.rows, rect.row + rect.rows) - row
                if rows <= 0:
                    continue
                start = start or self._start(path, piece, dtype)
                at = start + (row - rect.row) * rect.cols * ITEMSIZE[dtype]
                place = run.row + row - run.fused
                extents[run.tensor].append(Extent(place, rows, rect.col, rect.cols, path, at))
        found = []
        for size, parts in zip(hf_sizes, extents, strict=True):
            if sum(part.rows * part.cols for part in parts) != prod(size):
                raise WeightsError(f"{self.folder}: parts of {key} are missing, or there twice")
            found.append(FileTensor(dtype, size[0], prod(size[1:]), tuple(sorted(parts))))
        return found

    def _start(self, path: Path, piece: Piece, dtype: str) -> int:
        """Where the bytes of a chunk begin in its file."""
        try:
            with path.open("rb", buffering=0) as file:
                data = archive.data_of(file, piece.start, piece.length)
            if (data.dtype, prod(data.size)) != (dtype, prod(piece.sizes)):
                raise ValueError(f"{data.size} in {data.dtype}, wanted {piece.sizes} in {dtype}")
        except ValueError as error:
            raise WeightsError(
                f"{path} is damaged at byte {piece.start:,}, in {piece.key} ({error}); bring it "
                "back from a copy"
            ) from error
        return piece.start + data.start


def _is_padding(rows: int, vocab: int) -> bool:
    """Whether some layout pads a vocabulary to so many rows, by Megatron's multiples of 16 or 128.

    Any more would be another vocabulary, of which tokens would be lost.
    """
    return any(rows == padded(vocab, by * tp) for tp in range(1, 65) for by in (1, 8))


def empty_states(num_layers: int) -> Iterator[str]:
    """The keys of the states that layers ask for."""
    for name in _LAYER_STATES:
        for layer in range(num_layers):
            yield f"decoder.layers.{name}._extra_state/shard_{layer}_{num_layers}"
    yield _FINAL_STATE


def write_metadata(
    folder: Path,
    pieces: Iterable[tuple[str, Piece]],  # with their files
    sizes: dict[str, tuple[tuple[int, ...], str]],  # and types, of the keys
) -> None:
    """What makes a directory of chunks a checkpoint for Megatron."""
    (folder / "common.pt").write_bytes(archive.plain({}))
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    dist_metadata.write(folder, pieces, sizes)
