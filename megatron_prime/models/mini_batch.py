"""One optimizer step's rows, and a micro-batch's part in its loss.

A loss of `algorithm/` is a mean over the rows (or tokens) it is given. The mean over a mini-batch
is the sum over its micro-batches of each one's mean times its share of the rows (or tokens): that
is why losses don't depend on how a mini-batch is cut up or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_prime.models.engine import Forward
from megatron_prime.types import Metrics, RolloutBatch


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """How much an optimizer step takes in, over all ranks."""

    rollouts: int
    tokens: int  # response tokens

    @classmethod
    def of(cls, batch: RolloutBatch, rows: Tensor) -> MiniBatch:
        """Count `rows` (int64 [n]) of `batch`."""
        return cls(len(rows), int(batch.response_mask[rows].sum()))

    def share(
        self, mask: Tensor, per: Literal["seq_mean_token_mean", "token_mean"]
    ) -> Tensor | float:
        """The share of a micro-batch with response `mask` [b, T] in a mean over rows or tokens."""
        return (
            len(mask) / self.rollouts if per == "seq_mean_token_mean" else mask.sum() / self.tokens
        )

    @staticmethod
    def cut(forward: Forward, *tensors: Tensor) -> list[Tensor]:
        """The micro-batch's rows and columns of [N, T] tensors, on its device: each [b, T]."""
        rows, width = forward.rows.cpu(), forward.logprobs.shape[1]
        return [tensor[rows, :width].to(forward.logprobs.device) for tensor in tensors]


def mean_metrics(steps: Sequence[Metrics]) -> Metrics:
    """Mean of each figure over the optimizer steps of an update."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
