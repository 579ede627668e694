"""The policy: the model that reinforcement learning trains.

Its ratio starts from the trainer's own log-probs of before the update, or from the engine's at the
moment of sampling (`policy.old_logprobs`); the trainer's may be weighted with what it differs from
the engine (`policy.loss.importance`).

The trainer's cost a forward of their own only for mini-batches that train after an optimizer step:
the first one's training forward is of the weights of before the update. So its ratios are 1, not
1 up to the rounding of two forwards, and an update of a single mini-batch scores nothing.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_prime.algorithm.importance import importance_metrics, importance_weights
from megatron_prime.algorithm.metrics import policy_metrics, ref_kl
from megatron_prime.algorithm.policy_loss import aggregate, clipped_policy_loss, kl_penalties
from megatron_prime.config import PolicySection
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
from megatron_prime.types import Metrics, OldLogprobs, PolicyUpdate, RolloutBatch, TrainBatch
from megatron_prime.weights.source import LiveWeights


class MegatronPolicy:
    """The Policy role on a Megatron-core engine."""

    def __init__(
        self, engine: TrainableEngine, knobs: PolicySection, seed: int, guard: Guard
    ) -> None:
        self.engine = engine
        self.guard = guard
        self.knobs = knobs
        self.seed = seed
        self.version = 0

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs at the sampling temperature, without gradients: float32 [N, T]."""
        return self.guard.logprobs(self.engine, batch)

    def old_logprobs(self, batch: RolloutBatch, every_row: bool = False) -> OldLogprobs:
        """Log-probs of before the coming update, of all its mini-batches but the first.

        `every_row`: of that one, too, for someone who needs them before the update.
        """
        later = self._order(batch)[0 if every_row else self.knobs.mini_batch_size :]
        if not len(later):
            return OldLogprobs.none(batch)
        return OldLogprobs.scored(batch, later, self.logprobs(batch.select(later)))

    def _order(self, batch: RolloutBatch) -> Tensor:
        """The rows of `batch` as the next update shuffles them: int64 [N]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.version)
        return torch.randperm(len(batch.sequences), generator=generator)

    def update(self, batch: TrainBatch) -> PolicyUpdate:
        """One pass over the batch in shuffled mini-batches, an optimizer step each.

        None of a mini-batch without a loss: momentum and weight decay would move weights.
        Raises ValueError when rows that train after an optimizer step were not scored.
        """
        rollouts, scored = batch.scored.rollouts, batch.scored.old_logprobs
        order, size = self._order(rollouts), self.knobs.mini_batch_size
        if missing := int((~scored.known[order[size:]]).sum()):
            raise ValueError(
                f"found {missing} rows without old log-probs behind the first mini-batch, wanted "
                "those of old_logprobs(), asked after the last update and for the same rows"
            )
        rate = self.engine.next_rate()
        seen = torch.zeros(rollouts.response_mask.shape)  # by the training forwards
        metrics, steps = [], []
        for rows in order.split(size):
            part, step = MiniBatch.of(rollouts, learning(rollouts, rows)), None
            if part.rollouts:
                loss = self.loss_of(batch, part)
                step = self.guard.train_step(self.engine, batch, rows, loss)
            if step is not None:
                steps.append(step)
                seen[rows] = step.logprobs[rows]
                metrics.append((part, self._metrics(batch, learning(rollouts, rows), step)))
            elif not scored.known[rows].all():  # the first: no weight has changed
                found = self.logprobs(rollouts.select(rows))
                seen[rows, : found.shape[1]] = found
        self.version += any(step.updated for step in steps)
        old = scored.or_else(seen)
        shown = combine(metrics) | {"policy/lr": rate} | self._importance_metrics(rollouts, old)
        shown |= loss_scaling("policy", self.engine.precision, steps)
        if rollouts.learns is not None:
            shown["policy/masked"] = 1 - rollouts.learns.float().mean().item()
        return PolicyUpdate(old, shown | self.guard.end_update(len(steps)))

    def loss_of(self, batch: TrainBatch, part: MiniBatch) -> Loss:
        """What a mini-batch's micro-batches are judged by."""
        return partial(self._loss, batch, part)

    def _loss(self, batch: TrainBatch, part: MiniBatch, forward: Forward) -> Tensor:
        """This micro-batch's share of the mini-batch's loss: clipped, less entropy, plus KL."""
        options, rollouts = self.knobs.loss, batch.scored.rollouts
        forward = learning_part(rollouts, forward)
        if not len(forward.rows):
            return forward.logprobs.sum()  # 0, and so is its gradient
        advantages, mask, of_engine = part.cut(
            forward, batch.advantages, rollouts.response_mask, rollouts.rollout_logprobs
        )
        old = batch.scored.old_logprobs.select(forward.rows.cpu()).or_else(forward.logprobs)
        weights = None
        if options.importance != "none":
            weights = importance_weights(
                old, of_engine, mask, options.importance, options.importance_cap
            )
        start = of_engine if self.knobs.old_logprobs == "rollout" else old
        loss = clipped_policy_loss(forward.logprobs, start, advantages, mask, options, weights)
        if options.entropy_coefficient:
            entropy = aggregate(forward.entropy, mask, options.aggregation)
            loss = loss - options.entropy_coefficient * entropy
        if options.kl_coefficient:
            (ref,) = part.cut(forward, reference_of(batch))
            penalties = kl_penalties(forward.logprobs, ref, start, mask, options.kl_estimator)
            loss = loss + options.kl_coefficient * aggregate(penalties, mask, options.aggregation)
        return loss * part.share(mask, options.aggregation)

    def _metrics(self, batch: TrainBatch, rows: Tensor, step: StepResult) -> Metrics:
        rollouts, logprobs = batch.scored.rollouts, step.logprobs[rows]
        mask, advantages = rollouts.response_mask[rows], batch.advantages[rows]
        start = batch.scored.old_logprobs.select(rows).or_else(logprobs)
        if self.knobs.old_logprobs == "rollout":
            start = rollouts.rollout_logprobs[rows]
        moved = policy_metrics(logprobs, start, advantages, mask, self.knobs.loss)
        if self.knobs.loss.kl_coefficient:
            moved |= ref_kl(logprobs, reference_of(batch)[rows], mask)
        return {f"policy/{name}": value for name, value in moved.items()} | {
            "policy/loss": step.loss,
            "policy/grad_norm": step.grad_norm,
            "policy/entropy": step.entropy[rows][mask].mean().item(),
        }

    def _importance_metrics(self, rollouts: RolloutBatch, old_logprobs: Tensor) -> Metrics:
        options = self.knobs.loss
        if options.importance == "none":
            return {}
        found = importance_metrics(
            old_logprobs,
            rollouts.rollout_logprobs,
            rollouts.response_mask,
            options.importance,
            options.importance_cap,
        )
        return {f"policy/{name}": value for name, value in found.items()}

    def weights(self) -> LiveWeights:
        """The live parameters, for a rollout engine to take."""
        return LiveWeights(self.engine.modules, self.engine.shape)


def reference_of(batch: TrainBatch) -> Tensor:
    """The reference's log-probs, for a loss that has them: float32 [N, T]."""
    assert batch.scored.ref_logprobs is not None, "a KL divergence needs reference log-probs"
    return batch.scored.ref_logprobs
