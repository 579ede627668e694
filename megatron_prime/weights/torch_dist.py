"""Megatron's distributed checkpoints (`torch_dist`), a parameter at a time and without any ranks.

A checkpoint knows no layout. Each parameter of the whole model has a key, the layers' stacked under
one, and lies there in chunks with their offsets: cut as the ranks that wrote it had cut it. A
reader takes whatever chunks overlap with what it wants. So a converter may write and read
parameters one by one; how it cuts them (`tp`) only decides what each rank must read later, for a
chunk is always read whole. Each chunk is a small archive of `torch.save` within a larger file;
where its bytes lie there is looked up, so that they are read once, into place.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prime.weights.layout import Layout, fuse, part_of
from megatron_prime.weights.names import Entry, disk_key, entries
from megatron_prime.weights.raw_safetensors import empty, read_into
from megatron_prime.weights.safetensors_io import WeightsError
from megatron_prime.weights.shape import ModelShape

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


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a parameter, or without offsets a state, and the bytes that hold it."""

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    start: int
    length: int


def shards_of(
    layout: Layout, tensors: Sequence[Tensor], shape: ModelShape, tp: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A parameter of the whole model in the chunks that `tp` ranks would save, with their offsets.

    Gate and up are chunks of their own, as Megatron's ranks save them. On the meta device this is
    the plan; what it yields may be a view.
    """
    for rank in range(1 if layout is Layout.WHOLE else tp):
        parts = [t[part_of(layout, t.shape, shape, tp, rank)] for t in tensors]
        if layout is Layout.GATE_UP:
            for above, part in enumerate(parts):
                yield (above * tensors[0].shape[0] + rank * part.shape[0], 0), part
            continue
        shard = fuse(layout, parts, shape, tp)
        if layout is Layout.COLUMNS:
            yield (0, rank * shard.shape[1]), shard
        else:
            yield (rank * shard.shape[0],) + (0,) * (shard.dim() - 1), shard


def fused_size(
    entry: Entry, hf_sizes: Iterable[Sequence[int]], shape: ModelShape
) -> tuple[int, ...]:
    """The size of a parameter of the whole model."""
    parts = [torch.empty(tuple(size), device="meta") for size in hf_sizes]
    return tuple(fuse(entry.layout, parts, shape, 1).shape)


class DistCheckpoint:
    """The weights in a directory of Megatron's; optimizer states may be there, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except FileNotFoundError as error:
            raise WeightsError(f"{folder} is no distributed checkpoint: no .metadata") from error
        except (EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise WeightsError(f"{folder}/.metadata is damaged ({error})") from error
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, int | None], list[ChunkStorageMetadata]] = {}
        for key, stored in self.tensors.items():
            for chunk in stored.chunks:
                layer = chunk.offsets[0] if key.startswith("decoder.layers.") else None
                self._chunks.setdefault((key, layer), []).append(chunk)

    def check(self, shape: ModelShape, hf_sizes: dict[str, tuple[int, ...]]) -> None:
        """WeightsError unless the weights are those of `shape` and all files have their length."""
        wanted: dict[str, tuple[int, ...]] = {}
        for entry in entries(shape):
            key, layer = disk_key(entry.megatron)
            size = fused_size(entry, (hf_sizes[name] for name in entry.hf), shape)
            wanted[key] = size if layer is None else (shape.num_layers, *size)
            if entry.layout is Layout.VOCAB and key in self.tensors:  # padded for another layout
                rows = self.tensors[key].size[0]
                wanted[key] = (max(rows, shape.vocab_size), *size[1:])
        here = {key for key in self.tensors if key.startswith(WEIGHTS)}
        problems = {
            "lacks": sorted(wanted.keys() - here),
            "has unknown": sorted(here - wanted.keys()),
            "has wrong": [
                f"{key} is {tuple(self.tensors[key].size)}, wanted {size}"
                for key, size in wanted.items()
                if key in here and tuple(self.tensors[key].size) != size
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
        ends: dict[str, int] = {}
        for place in self._places.values():
            file = place.relative_path
            ends[file] = max(ends.get(file, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found < end:
                raise WeightsError(
                    f"{path} is absent or cut short: {found:,} bytes, wanted "
                    f"{end:,}; bring it back from a copy"
                )

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a parameter of the table."""
        dtype: torch.dtype = self.tensors[disk_key(name)[0]].properties.dtype
        return dtype

    def read(self, name: str) -> Tensor:
        """A parameter of the whole model, fused as one rank alone would hold it."""
        key, layer = disk_key(name)
        stored, chunks = self.tensors[key], self._chunks[key, layer]
        lead = 0 if layer is None else 1
        whole = empty(stored.size[lead:], stored.properties.dtype)
        if sum(chunk.sizes.numel() for chunk in chunks) < whole.numel():
            raise WeightsError(f"{self.folder}: parts of {key} are missing")
        for chunk in chunks:
            place = tuple(
                slice(start, start + length)
                for start, length in zip(chunk.offsets[lead:], chunk.sizes[lead:], strict=True)
            )
            self._read_chunk(self._places[MetadataIndex(key, chunk.offsets)], whole[place])
        return whole

    def _read_chunk(self, place: _StorageInfo, target: Tensor) -> None:
        path = self.folder / place.relative_path
        with path.open("rb") as file:
            archive: Any = _Window(file, place.offset, place.length)
            seen = torch.load(archive, map_location="meta", weights_only=True)
            with zipfile.ZipFile(archive) as members:
                (data,) = (m for m in members.infolist() if m.filename.endswith("/data/0"))
            plain = seen.is_contiguous() and data.file_size == seen.nbytes
            if not plain or seen.dtype != target.dtype:
                archive.seek(0)
                loaded = torch.load(archive, map_location="cpu", weights_only=True)
                target.copy_(loaded.view(target.shape))
                return
            file.seek(place.offset + data.header_offset + 26)  # lengths of name and extra field
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            start = place.offset + data.header_offset + 30 + name + extra
        into = target if target.is_contiguous() else torch.empty_like(target).contiguous()
        read_into(into, path, start)
        if into is not target:
            target.copy_(into)


class _Window(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        left = max(self._length - self._at, 0)
        got: int = self._file.readinto(memoryview(buffer)[:left])
        self._at += got
        return got


@contextmanager
def without_archive_sums() -> Iterator[None]:
    """Let torch.save leave its checksums out: nothing reads them, and the manifest has its own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def empty_states(num_layers: int) -> Iterator[str]:
    """The keys of the states that layers ask for."""
    for name in _LAYER_STATES:
        for layer in range(num_layers):
            yield f"decoder.layers.{name}._extra_state/shard_{layer}_{num_layers}"
    yield _FINAL_STATE


def write_metadata(
    folder: Path,
    pieces: Iterable[tuple[str, Piece]],  # with their files
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]],  # of the keys
) -> None:
    """What makes a directory of chunks a checkpoint for Megatron."""
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), [])
        for key, (size, dtype) in sizes.items()
    }
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file, piece in pieces:
        if piece.offsets is None:
            described[piece.key] = BytesStorageMetadata()
        else:
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            described[piece.key].chunks.append(chunk)
        index = MetadataIndex(piece.key, piece.offsets)
        places[index] = _StorageInfo(file, piece.start, piece.length)
    torch.save({}, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    metadata = Metadata(described, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
