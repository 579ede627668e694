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
from megatron_prime.weights.gather import gather_hf_tensors, values_of
from megatron_prime.weights.layout import unfuse
from megatron_prime.weights.names import Entry, entries, hf_shapes, parameters_by_entry
from megatron_prime.weights.safetensors_io import HfCheckpoint
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.stretches import whole


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

    def stretch(self, hf: str) -> Tensor:
        """A whole tensor."""
        entry = self._entry_of[hf]
        stored = self._source.tensors(entry)[entry.hf.index(hf)]
        values = torch.from_numpy(whole(stored).reshape(-1)).view(getattr(torch, stored.dtype))
        return values.view(self._sizes[hf])

    def forget(self) -> None:
        """Nothing is kept."""
