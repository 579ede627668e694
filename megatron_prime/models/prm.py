"""The implicit process reward model: a language model whose log-ratio to the reference is a reward.

R(y) = beta * sum_t log(prm(y_t) / ref(y_t)) is trained with cross-entropy on the outcome alone
(arXiv 2502.01456, Eq. 3 and the CE objective); no step labels. Its log-probs are taken at
temperature 1, for it scores and never samples.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_prime.algorithm.prm_loss import prm_ce_loss
from megatron_prime.config import PrmSection
from megatron_prime.models.engine import Forward, Loss
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
            loss = self.loss_of(batch, part)
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

    def loss_of(self, batch: ScoredBatch, part: MiniBatch) -> Loss:
        """What a mini-batch's micro-batches are judged by."""
        return partial(self._loss, batch, part)

    def _loss(self, batch: ScoredBatch, part: MiniBatch, forward: Forward) -> Tensor:
        """This micro-batch's share of the mini-batch's cross-entropy."""
        assert batch.ref_logprobs is not None, "a PRM update needs reference log-probs"
        ref, mask = part.cut(forward, batch.ref_logprobs, batch.rollouts.response_mask)
        outcomes = batch.rollouts.outcome_rewards[forward.rows.cpu()].to(ref.device)
        loss = prm_ce_loss(forward.logprobs, ref, mask, outcomes, self.knobs.beta)
        return loss * part.share(mask, "seq_mean_token_mean")


def fp8_error(in_fp8: Tensor, without: Tensor, rollouts: RolloutBatch, rows: Tensor) -> Metrics:
    """Mean distance of the log-probs of `rows` [n] with FP8 [N, T] and without it [n, T']."""
    width = without.shape[1]
    apart = (in_fp8[rows, :width] - without).abs()
    return {"prm/fp8_logprob_error": apart[rollouts.response_mask[rows, :width]].mean().item()}
