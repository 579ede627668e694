"""The policy: the model that reinforcement learning trains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_prime.algorithm.metrics import policy_metrics
from megatron_prime.algorithm.policy_loss import aggregate, clipped_policy_loss
from megatron_prime.config import PolicySection
from megatron_prime.models.engine import Forward, Loss
from megatron_prime.models.guard import Guard
from megatron_prime.models.mini_batch import MiniBatch, combine, loss_scaling
from megatron_prime.models.training import StepResult, TrainableEngine
from megatron_prime.types import Metrics, RolloutBatch, TrainBatch
from megatron_prime.weights.gather import gather_hf_tensors


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
        return combine(metrics) | {"policy/lr": rate} | scaling | self.guard.end_update(len(steps))

    def loss_of(self, batch: TrainBatch, part: MiniBatch) -> Loss:
        """What a mini-batch's micro-batches are judged by."""
        return partial(self._loss, batch, part)

    def _loss(self, batch: TrainBatch, part: MiniBatch, forward: Forward) -> Tensor:
        """This micro-batch's share of the mini-batch's clipped loss, less the entropy bonus."""
        options = self.knobs.loss
        old, advantages, mask = part.cut(
            forward,
            batch.scored.old_logprobs,
            batch.advantages,
            batch.scored.rollouts.response_mask,
        )
        loss = clipped_policy_loss(forward.logprobs, old, advantages, mask, options)
        if options.entropy_coefficient:
            entropy = aggregate(forward.entropy, mask, options.aggregation)
            loss = loss - options.entropy_coefficient * entropy
        return loss * part.share(mask, options.aggregation)

    def _metrics(self, batch: TrainBatch, rows: Tensor, step: StepResult) -> Metrics:
        mask = batch.scored.rollouts.response_mask[rows]
        old, advantages = batch.scored.old_logprobs[rows], batch.advantages[rows]
        moved = policy_metrics(step.logprobs[rows], old, advantages, mask, self.knobs.loss)
        return {f"policy/{name}": value for name, value in moved.items()} | {
            "policy/loss": step.loss,
            "policy/grad_norm": step.grad_norm,
            "policy/entropy": step.entropy[rows][mask].mean().item(),
        }

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in Hugging Face names on every rank; collective."""
        return gather_hf_tensors(self.engine.modules, self.engine.shape)
