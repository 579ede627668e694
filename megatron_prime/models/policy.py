"""The policy: the model that reinforcement learning trains.

Its ratio starts from the trainer's own log-probs of before the update, or from the engine's at the
moment of sampling (`policy.old_logprobs`); the trainer's may be weighted with what it differs from
the engine (`policy.loss.importance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_prime.algorithm.importance import importance_metrics, importance_weights
from megatron_prime.algorithm.metrics import policy_metrics
from megatron_prime.algorithm.policy_loss import aggregate, clipped_policy_loss
from megatron_prime.config import PolicySection
from megatron_prime.models.engine import Forward, Loss
from megatron_prime.models.guard import Guard
from megatron_prime.models.mini_batch import MiniBatch, combine, loss_scaling
from megatron_prime.models.training import StepResult, TrainableEngine
from megatron_prime.types import Metrics, RolloutBatch, TrainBatch
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

    def update(self, batch: TrainBatch) -> Metrics:
        """One pass over the batch in shuffled mini-batches, an optimizer step each."""
        rollouts = batch.scored.rollouts
        rate = self.engine.next_rate()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.version)
        order = torch.randperm(len(rollouts.sequences), generator=generator)
        metrics, steps = [], []
        for rows in order.split(self.knobs.mini_batch_size):
            part = MiniBatch.of(rollouts, rows)
            loss = self.loss_of(batch, part)
            step = self.guard.train_step(self.engine, batch, rows, loss)
            if step is not None:
                steps.append(step)
                metrics.append((part, self._metrics(batch, rows, step)))
        self.version += any(step.updated for step in steps)
        scaling = loss_scaling("policy", self.engine.precision, steps)
        found = combine(metrics) | {"policy/lr": rate} | scaling | self._importance_metrics(batch)
        return found | self.guard.end_update(len(steps))

    def loss_of(self, batch: TrainBatch, part: MiniBatch) -> Loss:
        """What a mini-batch's micro-batches are judged by."""
        rollouts, options = batch.scored.rollouts, self.knobs.loss
        constants = [self._start_of(batch), batch.advantages, rollouts.response_mask]
        if options.importance != "none":
            constants.append(
                importance_weights(
                    batch.scored.old_logprobs,
                    rollouts.rollout_logprobs,
                    rollouts.response_mask,
                    options.importance,
                    options.importance_cap,
                )
            )
        return partial(self._loss, part, constants)

    def _start_of(self, batch: TrainBatch) -> Tensor:
        """The log-probs [N, T] that the clipped ratio is 1 at."""
        if self.knobs.old_logprobs == "rollout":
            return batch.scored.rollouts.rollout_logprobs
        return batch.scored.old_logprobs

    def _loss(self, part: MiniBatch, constants: Sequence[Tensor], forward: Forward) -> Tensor:
        """This micro-batch's share of the mini-batch's clipped loss, less the entropy bonus."""
        options = self.knobs.loss
        old, advantages, mask, *weights = part.cut(forward, *constants)
        loss = clipped_policy_loss(forward.logprobs, old, advantages, mask, options, *weights)
        if options.entropy_coefficient:
            entropy = aggregate(forward.entropy, mask, options.aggregation)
            loss = loss - options.entropy_coefficient * entropy
        return loss * part.share(mask, options.aggregation)

    def _metrics(self, batch: TrainBatch, rows: Tensor, step: StepResult) -> Metrics:
        mask = batch.scored.rollouts.response_mask[rows]
        old, advantages = self._start_of(batch)[rows], batch.advantages[rows]
        moved = policy_metrics(step.logprobs[rows], old, advantages, mask, self.knobs.loss)
        return {f"policy/{name}": value for name, value in moved.items()} | {
            "policy/loss": step.loss,
            "policy/grad_norm": step.grad_norm,
            "policy/entropy": step.entropy[rows][mask].mean().item(),
        }

    def _importance_metrics(self, batch: TrainBatch) -> Metrics:
        rollouts, options = batch.scored.rollouts, self.knobs.loss
        if options.importance == "none":
            return {}
        found = importance_metrics(
            batch.scored.old_logprobs,
            rollouts.rollout_logprobs,
            rollouts.response_mask,
            options.importance,
            options.importance_cap,
        )
        return {f"policy/{name}": value for name, value in found.items()}

    def weights(self) -> LiveWeights:
        """The live parameters, for a rollout engine to take."""
        return LiveWeights(self.engine.modules, self.engine.shape)
