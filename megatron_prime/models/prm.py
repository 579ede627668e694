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
from megatron_prime.models.engine import Forward, TrainableEngine
from megatron_prime.models.mini_batch import MiniBatch, combine
from megatron_prime.types import PrmUpdate, RolloutBatch, ScoredBatch


class MegatronPrm:
    """The ProcessRewardModel role on a Megatron-core engine."""

    def __init__(self, engine: TrainableEngine, knobs: PrmSection) -> None:
        self.engine = engine
        self.knobs = knobs

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses, without gradients: float32 [N, T]."""
        return self.engine.logprobs(batch.sequences)

    def update(self, batch: ScoredBatch) -> PrmUpdate:
        """One pass over the batch, in its order, an optimizer step per mini-batch.

        The training forwards of mini-batch m come from weights that have seen the m - 1 before it,
        as in the released code.
        """
        rollouts = batch.rollouts
        rate = self.engine.next_rate()
        forward_logprobs = torch.zeros(rollouts.response_mask.shape)
        metrics = []
        for rows in torch.arange(len(rollouts.sequences)).split(self.knobs.mini_batch_size):
            part = MiniBatch.of(rollouts, rows)
            step = self.engine.train_step(
                rollouts.sequences, rows.tolist(), partial(self._loss, batch, part)
            )
            forward_logprobs[rows] = step.logprobs[rows]
            metrics.append((part, {"prm/loss": step.loss, "prm/grad_norm": step.grad_norm}))
        return PrmUpdate(forward_logprobs, combine(metrics) | {"prm/lr": rate})

    def _loss(self, batch: ScoredBatch, part: MiniBatch, forward: Forward) -> Tensor:
        """This micro-batch's share of the mini-batch's cross-entropy."""
        assert batch.ref_logprobs is not None, "a PRM update needs reference log-probs"
        ref, mask = part.cut(forward, batch.ref_logprobs, batch.rollouts.response_mask)
        outcomes = batch.rollouts.outcome_rewards[forward.rows.cpu()].to(ref.device)
        loss = prm_ce_loss(forward.logprobs, ref, mask, outcomes, self.knobs.beta)
        return loss * part.share(mask, "seq_mean_token_mean")
