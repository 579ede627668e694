"""The critic of PPO: a language model that says, before each token, what rewards are to come.

It has the policy's shape with a value head (`value_head.py`) for its output layer and trains on the
same rollouts, by the same engine as the others. Values of before its update are what `gae.py`
compares rewards with, and what the update is clipped around; they cost a forward of their own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import masked_mean
from megatron_prime.algorithm.value_loss import (
    clipped_value_loss,
    explained_variance,
    value_metrics,
)
from megatron_prime.config import CriticSection
from megatron_prime.models.engine import Forward, Loss
from megatron_prime.models.guard import Guard
from megatron_prime.models.mini_batch import (
    MiniBatch,
    combine,
    learning,
    learning_part,
    loss_scaling,
)
from megatron_prime.models.training import StepResult, TrainableEngine
from megatron_prime.types import Metrics, RolloutBatch
from megatron_prime.value_batch import ValueBatch


class MegatronCritic:
    """The Critic role on a Megatron-core engine."""

    def __init__(self, engine: TrainableEngine, knobs: CriticSection, guard: Guard) -> None:
        self.engine = engine
        self.guard = guard
        self.knobs = knobs

    def values(self, batch: RolloutBatch) -> Tensor:
        """What it expects before each response token, without gradients: float32 [N, T]."""
        return self.guard.logprobs(self.engine, batch)

    def update(self, batch: ValueBatch) -> Metrics:
        """One pass over the batch, in its order, an optimizer step per mini-batch with a loss."""
        rollouts = batch.rollouts
        rate = self.engine.next_rate()
        metrics, steps = [], []
        for rows in torch.arange(len(rollouts.sequences)).split(self.knobs.mini_batch_size):
            part = MiniBatch.of(rollouts, learning(rollouts, rows))
            if not part.rollouts:
                continue
            step = self.guard.train_step(self.engine, batch, rows, self.loss_of(batch, part))
            if step is not None:
                steps.append(step)
                metrics.append((part, self._metrics(batch, learning(rollouts, rows), step)))
        mask = rollouts.response_mask
        if rollouts.learns is not None:
            mask = mask & rollouts.learns[:, None]
        figures = combine(metrics) | {
            "critic/lr": rate,
            "critic/explained_variance": explained_variance(batch.values, batch.to_come, mask),
            "critic/value_mean": masked_mean(batch.values, mask).item(),
            "critic/return_mean": masked_mean(batch.returns, mask).item(),
        }
        figures |= loss_scaling("critic", self.engine.precision, steps)
        return figures | self.guard.end_update(len(steps))

    def loss_of(self, batch: ValueBatch, part: MiniBatch) -> Loss:
        """What a mini-batch's micro-batches are judged by."""
        return partial(self._loss, batch, part)

    def _loss(self, batch: ValueBatch, part: MiniBatch, forward: Forward) -> Tensor:
        """This micro-batch's share of the mini-batch's loss, a mean over tokens."""
        forward = learning_part(batch.rollouts, forward)
        if not len(forward.rows):
            return forward.values.sum()  # 0, and so is its gradient
        old, returns, mask = part.cut(
            forward, batch.values, batch.returns, batch.rollouts.response_mask
        )
        loss = clipped_value_loss(forward.values, old, returns, mask, self.knobs.value_clip)
        return loss * part.share(mask, "token_mean")

    def _metrics(self, batch: ValueBatch, rows: Tensor, step: StepResult) -> Metrics:
        given = (batch.values[rows], batch.returns[rows], batch.rollouts.response_mask[rows])
        found = value_metrics(step.logprobs[rows], *given, self.knobs.value_clip)
        return {f"critic/{name}": value for name, value in found.items()} | {
            "critic/loss": step.loss,
            "critic/grad_norm": step.grad_norm,
        }
