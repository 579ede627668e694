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

from megatron_prime.config import PrecisionOptions
from megatron_prime.models.engine import Forward
from megatron_prime.models.training import StepResult
from megatron_prime.types import Metrics, RolloutBatch

_TOKEN_MEANS = (
    "/clip_fraction",
    "/approx_kl",
    "/ref_kl",
    "/entropy",
)  # other figures are of rollouts


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


def learning(batch: RolloutBatch, rows: Tensor) -> Tensor:
    """Those of `rows` (int64 [n]) that policy and critic learn from."""
    return rows if batch.learns is None else rows[batch.learns[rows]]


def learning_part(batch: RolloutBatch, forward: Forward) -> Forward:
    """Only the rows of a micro-batch that policy and critic learn from."""
    if batch.learns is None:
        return forward
    return forward.select(batch.learns[forward.rows.cpu()].to(forward.rows.device))


def combine(steps: Sequence[tuple[MiniBatch, Metrics]]) -> Metrics:
    """An update's figures from its optimizer steps': means weigh by what they are means of."""

    def figure(name: str) -> float:
        values = [metrics[name] for _, metrics in steps]
        if name.endswith("_max"):
            return max(values)
        per_token = name.endswith(_TOKEN_MEANS)
        weights = [part.tokens if per_token else part.rollouts for part, _ in steps]
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    return {name: figure(name) for name in steps[0][1]} if steps else {}


def loss_scaling(name: str, precision: PrecisionOptions, steps: Sequence[StepResult]) -> Metrics:
    """How fp16's loss scaling fared in an update: the last step's scale, and steps skipped."""
    if precision.dtype != "fp16" or not steps:
        return {}
    return {
        f"{name}/loss_scale": steps[-1].loss_scale,
        f"{name}/skipped_steps": sum(not step.updated for step in steps),
    }
