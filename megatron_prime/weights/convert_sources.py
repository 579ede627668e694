"""The tensors to convert, parameter by parameter, whichever form they come in.

Both kinds of checkpoint give the Hugging Face tensors of an entry of the table of names; so one
function converts their types, and one compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_prime.weights.layout import unfuse
from megatron_prime.weights.names import Entry, entries, hf_shapes
from megatron_prime.weights.raw_safetensors import HfFiles
from megatron_prime.weights.safetensors_io import WeightsError
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.torch_dist import DistCheckpoint


class Source(Protocol):
    """Where the tensors of the table's entries come from."""

    def dtype(self, entry: Entry) -> torch.dtype: ...  # noqa: D102
    def tensors(self, entry: Entry) -> list[Tensor]: ...  # noqa: D102


class HfSource:
    """A Hugging Face directory."""

    def __init__(self, hf_dir: Path, shape: ModelShape) -> None:
        self._files = HfFiles(hf_dir)
        may_ignore = ["lm_head.weight"] if shape.tied_embeddings else []
        self._files.check(hf_shapes(shape), may_ignore)
        self.hf_dir = hf_dir
        self.paths = [hf_dir / name for name in sorted(set(self._files.file_of.values()))]

    def dtype(self, entry: Entry) -> torch.dtype:
        """The type of an entry's tensors; one, or it can't be fused as it is."""
        first, *others = (self._files.stored(name).dtype for name in entry.hf)
        if any(dtype != first for dtype in others):
            raise WeightsError(f"{self.hf_dir}: {entry.hf} are of several types; give --dtype")
        return first

    def tensors(self, entry: Entry) -> list[Tensor]:
        """The tensors of an entry, in their names' order."""
        return [self._files.whole(name) for name in entry.hf]


class MegatronSource:
    """A distributed checkpoint."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._checkpoint, self._shape = DistCheckpoint(folder), shape
        self._checkpoint.check(shape, hf_shapes(shape))
        self.paths = [folder / ".metadata", *sorted(folder.glob("*.distcp"))]

    def dtype(self, entry: Entry) -> torch.dtype:
        """The type of an entry's parameter."""
        return self._checkpoint.dtype(entry.megatron)

    def tensors(self, entry: Entry) -> list[Tensor]:
        """The Hugging Face tensors of an entry, in their names' order."""
        return unfuse(entry.layout, self._checkpoint.read(entry.megatron), self._shape, 1, 0)


def converted(source: Source, entry: Entry, dtype: torch.dtype | None) -> list[Tensor]:
    """An entry's tensors in another type. WeightsError where fp16 can't hold a value."""
    tensors = source.tensors(entry)
    for i, name in enumerate(entry.hf):
        if dtype is None or tensors[i].dtype == dtype:
            continue
        before, tensors[i] = tensors[i], tensors[i].to(dtype)
        if dtype is torch.float16 and _finite(before) and not _finite(tensors[i]):
            raise WeightsError(f"{name} has values beyond fp16's range; take --dtype bf16 or fp32")
    return tensors


def verify(source: Source, made: Source, shape: ModelShape, dtype: torch.dtype | None) -> int:
    """Compare bit for bit, tensor by tensor; returns their number. WeightsError at the first."""
    compared = 0
    for entry in entries(shape):
        pairs = zip(converted(source, entry, dtype), made.tensors(entry), entry.hf, strict=True)
        for wanted, found, name in pairs:
            same = wanted.dtype == found.dtype and wanted.shape == found.shape
            if not same or not torch.equal(_bits(wanted), _bits(found)):
                raise WeightsError(f"--verify: {name} is not what it was made of; convert again")
            compared += 1
    return compared


def _finite(tensor: Tensor) -> bool:
    """Without a mask as large as the tensor."""
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
