"""What a model holds, as buffers that a scheduler can move; their names stand in `residency.py`.

Megatron's DDP and optimizer keep views of weights and gradients, so of those the storages are given
back and allocated again, and every view stays what it is. Masters and moments have no views: there
the tensors themselves move to the host, where a checkpoint finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_prime.models.engine import Engine
from megatron_prime.models.training import TrainableEngine
from megatron_prime.runtime.memory import Buffer, Kept, Piece, Remade, Slabs, Storages


def buffers_of(owner: str, engine: Engine) -> list[Buffer]:
    """All that `engine` keeps between micro-batches, by kind; a frozen one has weights only."""
    parameters = [p for module in engine.modules for p in module.parameters()]
    found = [Buffer(f"{owner}.fp8_copies", Fp8Copies(engine).pieces)]
    if not isinstance(engine, TrainableEngine):
        return [Buffer(f"{owner}.weights", Storages(Constant, lambda: parameters)), *found]
    # What has a master is made from it again; what is its own master is copied.
    made = Storages(Remade, lambda: [p for p in parameters if p.dtype != torch.float32])
    kept = Storages(Kept, lambda: [p for p in parameters if p.dtype == torch.float32])
    remake = engine.remake_weights if made() else None
    return [
        Buffer(f"{owner}.masters", Slabs(lambda: masters(engine))),
        Buffer(f"{owner}.weights", lambda: [*made(), *kept()], remake),
        Buffer(f"{owner}.moments", Slabs(lambda: moments(engine))),
        *found,
        Buffer(f"{owner}.gradients", Storages(Remade, lambda: gradients(engine))),
    ]


class Constant(Kept):
    """Of a model that no phase changes, so a copy on the host stays good."""

    def written(self) -> None:
        """It never is."""


def masters(engine: TrainableEngine) -> Iterator[Tensor]:
    """fp32 copies of 16-bit weights: of all, or of this rank's shards."""
    weights = {p.untyped_storage()._cdata for m in engine.modules for p in m.parameters()}
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.untyped_storage()._cdata not in weights:
                yield parameter


def moments(engine: TrainableEngine) -> Iterator[Tensor]:
    """Adam's moments; none before the first step."""
    for optimizer in engine.optimizers:
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield value


def gradients(engine: TrainableEngine) -> Iterator[Tensor]:
    """The buffers that all gradients lie in."""
    for chunk in engine.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            yield buffer.grad_data


class Fp8Copies:
    """Transformer Engine's FP8 copies of 16-bit weights; the next forward makes them again.

    Never tried on a GPU.
    """

    def __init__(self, engine: Engine) -> None:
        self._caches: list[dict[str, Any]] = [
            part._fp8_workspaces
            for module in engine.modules
            for part in module.modules()
            if hasattr(part, "_fp8_workspaces")
        ]

    def pieces(self) -> Sequence[Piece]:
        """One, or none where there are no such layers."""
        return [self] if self._caches else []

    @property
    def nbytes(self) -> int:
        """As many as there are now."""
        tensors = (copy for cache in self._caches for copy in cache.values())
        return sum(
            value.nbytes
            for tensor in tensors
            for value in vars(tensor).values()
            if isinstance(value, Tensor)
        )

    def put_away(self) -> int:
        """Nothing is copied."""
        return 0

    def free(self) -> None:
        """Forget all copies."""
        for cache in self._caches:
            cache.clear()

    def allocate(self) -> None:
        """They come with the next forward."""

    def take_back(self) -> int:
        """Nothing is copied."""
        return 0

    def written(self) -> None:
        """There is no copy on the host."""

    def held(self) -> tuple[int, int]:
        """Bytes on device and host."""
        return self.nbytes, 0
