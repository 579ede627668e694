"""What a critic learns from: a type of its own, for a run without a critic has no use for it.

Shapes are those of `types.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_prime.types import RolloutBatch


@dataclass(frozen=True, slots=True)
class ValueBatch:
    """Rollouts with what the critic expected of them, and what came."""

    rollouts: RolloutBatch
    values: Tensor  # float32 [N, T], before the update, 0 on padding
    returns: Tensor  # float32 [N, T], what it learns, 0 on padding
    to_come: Tensor  # float32 [N, T], rewards to come, with no value in them, 0 on padding

    def select(self, rows: Tensor) -> ValueBatch:
        """Only `rows` (int64 [n])."""
        tensors = self.values[rows], self.returns[rows], self.to_come[rows]
        return ValueBatch(self.rollouts.select(rows), *tensors)
