"""Reading parts of, and writing, the safetensors of a Hugging Face checkpoint directory.

A checkpoint is one `model.safetensors`, or several files and an index that says which tensor is
where. Reading maps the files into memory, so a rank that asks for its slice of a tensor reads no
more than that. Writing goes to a directory beside the target whose files move over at the end,
config.json last: a directory without config.json is an export that did not finish.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prime.errors import WeightsError
from megatron_prime.weights.raw_safetensors import (
    INDEX,
    SHARD_BYTES,
    SINGLE,
    check_names,
    files_of,
)


class HfCheckpoint:
    """The tensors of a Hugging Face directory, opened file by file as they are asked for."""

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = hf_dir
        self._open: dict[str, Any] = {}
        self.file_of = files_of(hf_dir)  # by tensor name

    def check(self, wanted: Mapping[str, tuple[int, ...]], may_ignore: Iterable[str] = ()) -> None:
        """WeightsError unless there are exactly the `wanted` tensors, each in its shape.

        Surplus tensors are an error too (they mean another architecture), but for `may_ignore`.
        """
        found = {name: self.size(name) if name in wanted else () for name in self.file_of}
        check_names(self.hf_dir, found, wanted, may_ignore)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, whole."""
        for name in self.file_of:
            yield name, self.read(name, tuple(slice(0, length) for length in self.size(name)))

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.file_of

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """A stretch of a tensor, in the file's type, on the CPU."""
        tensor: Tensor = self._slice(name)[part]
        return tensor

    def _slice(self, name: str) -> Any:
        file = self.file_of[name]
        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise WeightsError(f"{self.hf_dir / file}: no tensor {name}: {error}") from error

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.hf_dir / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise WeightsError(f"{path} is in {INDEX} but not there; download it") from error
            except SafetensorError as error:
                raise WeightsError(
                    f"{path} is damaged or cut short ({error}); download or copy it again"
                ) from error
        return self._open[file]


def write_hf_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    others: Mapping[str, bytes],
    out_dir: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` as safetensors of at most `shard_bytes` (or one tensor) each, and `others`.

    `others` are small files by name, config.json among them. Files of an earlier export in
    `out_dir` are replaced; anything else in it stays.
    """
    writing = out_dir.parent / f".{out_dir.name}.writing"
    if writing.exists():  # of an export that died
        shutil.rmtree(writing)
    writing.mkdir(parents=True)
    shards, total = _write_shards(tensors, writing, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in _from_1(shards)]
        weight_map = {t: name for name, held in zip(names, shards, strict=True) for t in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (writing / INDEX).write_text(json.dumps(index, indent=2))
    for i, name in zip(_from_1(shards), names, strict=True):
        (writing / f"{i}.part").rename(writing / name)
    for name, content in others.items():
        (writing / name).write_bytes(content)
    _move_over(writing, out_dir)


def _from_1(items: list[Any]) -> range:
    return range(1, len(items) + 1)


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int
) -> tuple[list[list[str]], int]:
    """Write `1.part`, `2.part` …; returns the names in each and the bytes of all tensors."""
    shards: list[list[str]] = []
    total = 0
    held: dict[str, Tensor] = {}

    def flush() -> None:
        shards.append(list(held))
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        held.clear()

    held_bytes = 0
    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    return shards, total


def _move_over(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    (target / "config.json").unlink(missing_ok=True)
    for stale in (*target.glob("model*.safetensors"), target / INDEX):
        stale.unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(target / file.name)
    source.rmdir()
