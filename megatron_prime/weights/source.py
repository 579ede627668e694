"""Where new weights come from: the live policy, or a checkpoint's files.

All give a rank's own stretch of a Hugging Face tensor, which is what the reshard sends, and whole
tensors, which is what the local engine and an export take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prime.weights.convert_sources import MegatronSource
from megatron_prime.weights.directories import kind_of, weights_in
from megatron_prime.weights.gather import gather_hf_tensors, values_of
from megatron_prime.weights.layout import unfuse
from megatron_prime.weights.names import Entry, entries, hf_shapes, parameters_by_entry
from megatron_prime.weights.safetensors_io import HfCheckpoint
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.stretches import part


class LiveWeights:
    """The parameters of a model that is being trained, where they lie."""

    def __init__(self, chunks: Sequence[torch.nn.Module], shape: ModelShape) -> None:
        self._chunks, self._shape = chunks, shape
        self._held: dict[str, tuple[Entry, Tensor]] = {}
        for entry, parameter, _ in parameters_by_entry(chunks, shape):
            self._held |= dict.fromkeys(entry.hf, (entry, parameter.detach()))
        self._tp = parallel_state.get_tensor_model_parallel_world_size()
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._parts: dict[str, dict[str, Tensor]] = {}  # by Megatron's name, until `forget`

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, whole; collective over the model-parallel group."""
        return gather_hf_tensors(self._chunks, self._shape)

    def stretch(self, hf: str) -> Tensor:
        """This rank's part of a tensor, in the parameters' nominal type; KeyError if it has none.

        A view of the live parameter where that is possible.
        """
        entry, parameter = self._held[hf]
        if entry.megatron not in self._parts:  # q, k and v come together, for several receivers
            values = values_of(parameter)
            parts = unfuse(entry.layout, values, self._shape, self._tp, self._tp_rank)
            self._parts[entry.megatron] = dict(zip(entry.hf, parts, strict=True))
        return self._parts[entry.megatron][hf]

    def forget(self) -> None:
        """Let go of copies; the next `stretch` looks at the live parameters again."""
        self._parts.clear()


class CheckpointWeights:
    """The weights of a Hugging Face checkpoint; every rank can read all of them."""

    def __init__(self, hf_dir: Path) -> None:
        self._checkpoint = HfCheckpoint(hf_dir)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, whole."""
        return self._checkpoint.tensors()

    def stretch(self, hf: str) -> Tensor:
        """A whole tensor."""
        size = self._checkpoint.size(hf)
        return self._checkpoint.read(hf, tuple(slice(0, length) for length in size))

    def forget(self) -> None:
        """Nothing is kept."""


class MegatronWeights:
    """The weights in a Megatron checkpoint; every rank can read all of them."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """`folder` is a model's of a run's checkpoint. WeightsError if it has not this shape."""
        self._source = MegatronSource(folder, shape)
        self._sizes = hf_shapes(shape)
        self._entry_of = {name: entry for entry in entries(shape) for name in entry.hf}

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, whole."""
        for name in self._entry_of:
            yield name, self.stretch(name)

    def has(self, hf: str) -> bool:
        """Whether there is such a tensor."""
        return hf in self._entry_of

    def size(self, hf: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._sizes[hf]

    def read(self, hf: str, stretch: tuple[slice, ...]) -> Tensor:
        """A stretch of a tensor, in the file's type, on the CPU; of rows alone, all columns."""
        entry = self._entry_of[hf]
        stored = self._source.tensors(entry)[entry.hf.index(hf)]
        rows, cols = (*stretch, slice(0, stored.cols))[:2]
        values = torch.from_numpy(part(stored, rows, cols).reshape(-1))
        lengths = (taken.stop - taken.start for taken in stretch)
        size = (*lengths, *self._sizes[hf][len(stretch) :])
        return values.view(getattr(torch, stored.dtype)).view(size)

    def stretch(self, hf: str) -> Tensor:
        """A whole tensor."""
        return self.read(hf, tuple(slice(0, length) for length in self._sizes[hf]))

    def forget(self) -> None:
        """Nothing is kept."""


def weights_of(folder: Path, hf_dir: Path) -> CheckpointWeights | MegatronWeights:
    """The weights in any directory that has some; `hf_dir` knows the model's shape."""
    if kind_of(folder) == "huggingface":
        return CheckpointWeights(folder)
    return MegatronWeights(weights_in(folder, "policy").folder, ModelShape.from_hf(hf_dir))
