"""The tensors to convert, parameter by parameter, whichever form they come in.

Both kinds of checkpoint say where the Hugging Face tensors of an entry of the table of names lie;
so one function writes either form, and one compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from megatron_prime.errors import WeightsError
from megatron_prime.weights.dist_metadata import NAME
from megatron_prime.weights.names import Entry, hf_shapes
from megatron_prime.weights.raw_safetensors import HfFiles
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.stretches import Extent, FileTensor
from megatron_prime.weights.torch_dist import DistCheckpoint


class Source(Protocol):
    """Where the tensors of the table's entries come from."""

    folder: Path
    paths: list[Path]  # of the files with weights

    def dtype(self, entry: Entry) -> str: ...  # noqa: D102
    def tensors(self, entry: Entry) -> list[FileTensor]: ...  # noqa: D102


class HfSource:
    """A Hugging Face directory."""

    def __init__(self, hf_dir: Path, shape: ModelShape) -> None:
        self._files = HfFiles(hf_dir)
        may_ignore = ["lm_head.weight"] if shape.tied_embeddings else []
        self._files.check(hf_shapes(shape), may_ignore)
        self.folder = hf_dir
        self.paths = [hf_dir / name for name in sorted(set(self._files.file_of.values()))]

    def dtype(self, entry: Entry) -> str:
        """The type of an entry's tensors; one, or it can't be fused as it is."""
        first, *others = (self._files.stored(name).dtype for name in entry.hf)
        if any(dtype != first for dtype in others):
            raise WeightsError(f"{self.folder}: {entry.hf} are of several types; give --dtype")
        return first

    def tensors(self, entry: Entry) -> list[FileTensor]:
        """The tensors of an entry, in their names' order."""
        return [self._tensor(name) for name in entry.hf]

    def _tensor(self, name: str) -> FileTensor:
        stored, path = self._files.stored(name), self.folder / self._files.file_of[name]
        rows, cols = (*stored.size, 1)[:2]
        extent = Extent(0, rows, 0, cols, path, stored.start)
        return FileTensor(stored.dtype, rows, cols, (extent,))


class MegatronSource:
    """A distributed checkpoint."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._checkpoint, self._shape = DistCheckpoint(folder), shape
        self._sizes = hf_shapes(shape)
        self._checkpoint.check(shape, self._sizes)
        self.folder = folder
        self.paths = [folder / NAME, *sorted(folder.glob("*.distcp"))]

    def dtype(self, entry: Entry) -> str:
        """The type of an entry's parameter."""
        return self._checkpoint.dtype(entry.megatron)

    def tensors(self, entry: Entry) -> list[FileTensor]:
        """The Hugging Face tensors of an entry, in their names' order."""
        sizes = [self._sizes[name] for name in entry.hf]
        return self._checkpoint.tensors_of(entry, sizes, self._shape)
