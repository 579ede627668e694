"""The implicit process reward model: a language model whose log-ratio to the reference is a reward.

R(y) = beta * sum_t log(prm(y_t) / ref(y_t)) is trained on the outcome alone (arXiv 2502.01456,
Eq. 3 and the CE objective; `prm.loss` has others); no step labels. Its log-probs are taken at
temperature 1, for it scores and never samples.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.prm_loss import OF_EACH_RESPONSE, Tangent, sequence_loss
from megatron_prime.config import PrmSection
from megatron_prime.models.engine import Engine, Forward, Loss
from megatron_prime.models.guard import Guard
from megatron_prime.models.mini_batch import MiniBatch, combine, loss_scaling
from megatron_prime.models.precision import without_fp8
from megatron_prime.models.training import TrainableEngine
from megatron_prime.types import Metrics, PrmUpdate, RolloutBatch, ScoredBatch


class MegatronPrm:
    """The ProcessRewardModel role on a Megatron-core engine."""

    def __init__(self, engine: TrainableEngine, knobs: PrmSection, guard: Guard) -> None:
        self.engine = engine
        self.guard = guard
        self.knobs = knobs

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses, without gradients: float32 [N, T]."""
        return self.guard.logprobs(self.engine, batch)

    def update(self, batch: ScoredBatch) -> PrmUpdate:
        """One pass over the batch, in its order, an optimizer step per mini-batch.

        The training forwards of mini-batch m come from weights that have seen the m - 1 before it,
        as in the released code.
        """
        assert batch.ref_logprobs is not None, "a PRM update needs reference log-probs"
        rollouts = batch.rollouts
        rate = self.engine.next_rate()
        forward_logprobs = torch.zeros(rollouts.response_mask.shape)
        metrics, steps = [], []
        mini_batches = torch.arange(len(rollouts.sequences)).split(self.knobs.mini_batch_size)
        without = self._logprobs_without_fp8(rollouts.select(mini_batches[0]))
        error: Metrics = {}
        for number, rows in enumerate(mini_batches):
            part = MiniBatch.of(rollouts, rows)
            loss = self.loss_of(batch, rows)
            step = self.guard.train_step(self.engine, batch, rows, loss)
            if step is None:  # skipped: no weight changed, so a forward gives the same
                found = self.guard.logprobs(self.engine, rollouts.select(rows))
                forward_logprobs[rows, : found.shape[1]] = found
                continue
            steps.append(step)
            forward_logprobs[rows] = step.logprobs[rows]
            metrics.append((part, {"prm/loss": step.loss, "prm/grad_norm": step.grad_norm}))
            if number == 0 and without is not None:
                error = fp8_error(step.logprobs, without, rollouts, rows)
        figures = combine(metrics) | {"prm/lr": rate} | error
        figures |= loss_scaling("prm", self.engine.precision, steps)
        return PrmUpdate(forward_logprobs, figures | self.guard.end_update(len(steps)))

    def _logprobs_without_fp8(self, rollouts: RolloutBatch) -> Tensor | None:
        """What bf16 products would make of `rollouts`: float32 [n, T']; None without FP8."""
        if self.engine.precision.fp8 is None:
            return None
        with without_fp8(*self.engine.modules):
            return self.guard.logprobs(self.engine, rollouts)

    def loss_of(self, batch: ScoredBatch, rows: Tensor) -> Loss:
        """What the micro-batches of the mini-batch `rows` (int64 [n]) are judged by.

        A loss that compares responses costs a forward of the mini-batch here.
        """
        part, tangent = MiniBatch.of(batch.rollouts, rows), None
        if self.knobs.loss not in OF_EACH_RESPONSE:
            chosen = batch.select(rows)
            logprobs = self.guard.logprobs(self.engine, chosen.rollouts)
            rewards = self._rewards(chosen, logprobs, torch.arange(len(rows)))
            outcomes, group_size = chosen.rollouts.outcome_rewards, chosen.rollouts.group_size
            tangent = Tangent.of(rewards, outcomes, group_size, self.knobs.loss)
        return partial(self._loss, batch, rows, part, tangent)

    def _loss(
        self,
        batch: ScoredBatch,
        mini_batch: Tensor,
        part: MiniBatch,
        tangent: Tangent | None,
        forward: Forward,
    ) -> Tensor:
        """This micro-batch's share of the mini-batch's loss."""
        rows = forward.rows.cpu()
        rewards = self._rewards(batch, forward.logprobs, rows)
        if tangent is not None:
            return tangent.part(rewards, torch.searchsorted(mini_batch, rows))
        outcomes = batch.rollouts.outcome_rewards[rows].to(rewards.device)
        loss = sequence_loss(rewards, outcomes, 1, self.knobs.loss)
        return loss * (len(rows) / part.rollouts)

    def _rewards(self, batch: ScoredBatch, logprobs: Tensor, rows: Tensor) -> Tensor:
        """Sequence rewards R [b] of `rows` (int64 [b]), whose `logprobs` are [b, T']."""
        assert batch.ref_logprobs is not None, "a PRM update needs reference log-probs"
        ref, mask = (
            tensor[rows, : logprobs.shape[1]].to(logprobs.device)
            for tensor in (batch.ref_logprobs, batch.rollouts.response_mask)
        )
        return implicit_rewards(logprobs, ref, mask, self.knobs.beta).sum(dim=1)


class FrozenPrm:
    """The ProcessRewardModel role of a PRM that was trained elsewhere and learns no more."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        for module in engine.modules:
            module.requires_grad_(False)
        self.engine = engine
        self.guard = guard

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses: float32 [N, T]."""
        return self.guard.logprobs(self.engine, batch)

    def update(self, batch: ScoredBatch) -> PrmUpdate:
        """Nothing is learnt: a forward takes the training forwards' place, without figures."""
        return PrmUpdate(self.logprobs(batch.rollouts), {})


def fp8_error(in_fp8: Tensor, without: Tensor, rollouts: RolloutBatch, rows: Tensor) -> Metrics:
    """Mean distance of the log-probs of `rows` [n] with FP8 [N, T] and without it [n, T']."""
    width = without.shape[1]
    apart = (in_fp8[rows, :width] - without).abs()
    return {"prm/fp8_logprob_error": apart[rollouts.response_mask[rows, :width]].mean().item()}
