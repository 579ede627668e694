"""The PRM's only teacher is the outcome: losses of the whole response's implicit reward.

The sequence reward R, a sum over tokens, is the logit of "this response is right". No token is
labelled and nothing is divided by the length. Every loss here is a function of R [N] and of the
outcomes alone, computed through log sigmoid: a float32 sigmoid would lose its gradient where |R| is
above about 17.

Cross-entropy judges each response by itself, so a mini-batch may be cut anywhere. DPO and NCA
compare responses to one prompt, KTO asks for a mean over the mini-batch: there a micro-batch can't
know its part of the loss. `Tangent` gives it: a first forward of the whole mini-batch finds each
response's slope dL/dR, and slope times R, summed over any parts, has L's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.masked import at_least_float32, by_group, check_rows
from megatron_prime.config import PrmLoss

OF_EACH_RESPONSE: frozenset[PrmLoss] = frozenset({"ce", "ce_hard"})  # the others compare several


def prm_ce_loss(
    prm_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    outcome_rewards: Tensor,
    beta: float,
) -> Tensor:
    """Mean over N responses of -[r_o log sigmoid(R) + (1 - r_o) log sigmoid(-R)], PRIME's L_CE.

    Log-probs are [N, T] in nats; `outcome_rewards` [N] lie in [0, 1], fractions included. To split
    a mini-batch, weight each part's loss with its share of the rows. Raises ValueError for shapes
    that differ, empty responses and outcomes outside [0, 1].
    """
    check_rows(response_mask, outcome_rewards=outcome_rewards)
    rewards = implicit_rewards(prm_logprobs, ref_logprobs, response_mask, beta).sum(dim=1)
    return sequence_loss(rewards, outcome_rewards, 1, "ce")


def sequence_loss(
    sequence_rewards: Tensor, outcome_rewards: Tensor, group_size: int, loss: PrmLoss
) -> Tensor:
    """The loss called `loss` of sequence rewards R [N] and outcomes o [N] in [0, 1]: a scalar.

    ce       mean_i -[o_i log s(R_i) + (1 - o_i) log s(-R_i)], s the sigmoid: PRIME, soft labels
    ce_hard  the same with the label 1 where o_i = 1 and 0 elsewhere
    dpo      mean over pairs of -log s(R_w - R_l)                                (arXiv 2305.18290)
    nca      mean over pairs of -log s(R_w) - 1/2 log s(-R_w) - 1/2 log s(-R_l)  (arXiv 2402.05369)
    kto      mean_i 1 - s(R_i - z_l) if o_i = 1, else 1 - s(z_w - R_i)           (arXiv 2402.01306)

    A pair (w, l) are two responses of a group with o_w > o_l; all pairs of all groups count alike,
    and without any the loss is 0. In kto, z_w and z_l stand for the KL divergence: the mean R of
    the right and of the wrong responses, 0 if it is negative or there are none (the in-batch
    estimate of the implicit PRM's authors, arXiv 2412.01981), without gradient as in KTO's paper.
    Raises ValueError for partial groups, shapes that differ and outcomes outside [0, 1].
    """
    if sequence_rewards.shape != outcome_rewards.shape:
        raise ValueError(
            f"sequence_rewards: found shape {list(sequence_rewards.shape)}, wanted"
            f" {list(outcome_rewards.shape)}, that of outcome_rewards; take both from one batch"
        )
    outcomes = at_least_float32(outcome_rewards)
    if not ((outcomes >= 0) & (outcomes <= 1)).all():
        raise ValueError(
            f"outcome_rewards: found values from {float(outcomes.min())} to"
            f" {float(outcomes.max())}, wanted [0, 1], for they are cross-entropy labels; rescale"
            " what the verifier gives"
        )
    return _LOSSES[loss](at_least_float32(sequence_rewards), outcomes, group_size)


@dataclass(frozen=True, slots=True)
class Tangent:
    """A mini-batch's loss near the sequence rewards that it was found at, in parts for its rows."""

    loss: float
    slopes: Tensor  # [n], dL/dR of each response

    @classmethod
    def of(
        cls, sequence_rewards: Tensor, outcome_rewards: Tensor, group_size: int, loss: PrmLoss
    ) -> Self:
        """At R [n] of the whole mini-batch; raises ValueError as `sequence_loss` does."""
        with torch.enable_grad():
            rewards = at_least_float32(sequence_rewards.detach()).clone().requires_grad_()
            value = sequence_loss(rewards, outcome_rewards, group_size, loss)
            (slopes,) = torch.autograd.grad(value, rewards)
        return cls(float(value), slopes)

    def part(self, sequence_rewards: Tensor, rows: Tensor) -> Tensor:
        """What `rows` (int64 [b], of the n) with R [b] add to the loss.

        Parts that make up the mini-batch sum to its loss, and their gradients to its gradient.
        """
        slopes = self.slopes[rows.to(self.slopes.device)].to(sequence_rewards.device)
        moved = slopes * (sequence_rewards - sequence_rewards.detach())  # 0, with a gradient
        return moved.sum() + self.loss * len(rows) / len(self.slopes)


def _cross_entropy(rewards: Tensor, outcomes: Tensor, _group_size: int) -> Tensor:
    return -(outcomes * logsigmoid(rewards) + (1 - outcomes) * logsigmoid(-rewards)).mean()


def _hard_cross_entropy(rewards: Tensor, outcomes: Tensor, group_size: int) -> Tensor:
    return _cross_entropy(rewards, (outcomes >= 1).to(outcomes.dtype), group_size)


def _dpo(rewards: Tensor, outcomes: Tensor, group_size: int) -> Tensor:
    better, worse = _pairs(outcomes, group_size)
    return _mean(-logsigmoid(rewards[better] - rewards[worse]))


def _nca(rewards: Tensor, outcomes: Tensor, group_size: int) -> Tensor:
    better, worse = (rewards[rows] for rows in _pairs(outcomes, group_size))
    return _mean(-logsigmoid(better) - (logsigmoid(-better) + logsigmoid(-worse)) / 2)


def _kto(rewards: Tensor, outcomes: Tensor, _group_size: int) -> Tensor:
    right = outcomes >= 1
    of_right, of_wrong = (
        _mean(rewards.detach()[side]).clamp(min=0)  # in nats times beta, like R
        for side in (right, ~right)
    )
    ahead = torch.where(right, rewards - of_wrong, of_right - rewards)
    return torch.sigmoid(-ahead).mean()


def _pairs(outcomes: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rows of all pairs of one group whose outcomes differ: the better ones, the worse ones."""
    of_group = by_group(outcomes, group_size)
    group, first, second = (of_group[:, :, None] > of_group[:, None, :]).nonzero(as_tuple=True)
    return group * group_size + first, group * group_size + second


def _mean(values: Tensor) -> Tensor:
    """0, with a gradient of 0, where there are none."""
    return values.sum() / max(1, values.numel())


_LOSSES: dict[PrmLoss, Callable[[Tensor, Tensor, int], Tensor]] = {
    "ce": _cross_entropy,
    "ce_hard": _hard_cross_entropy,
    "dpo": _dpo,
    "nca": _nca,
    "kto": _kto,
}
