"""What a run shows of its mathematics: does the PRM rank responses, how far has the policy moved.

Nothing here has gradients or changes training. Means run over response tokens: those of two
micro-batches combine with the share of tokens in each, largest values with a maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prime.algorithm.advantage import returns_to_go
from megatron_prime.algorithm.masked import (
    at_least_float32,
    by_group,
    check_rows,
    check_tokens,
    masked_mean,
    masked_variance,
    zero_padding,
)
from megatron_prime.algorithm.policy_loss import kl_penalties, surrogate_losses
from megatron_prime.config import PolicyLossOptions


def pair_accuracy(sequence_rewards: Tensor, outcome_rewards: Tensor, group_size: int) -> Tensor:
    """How often the PRM ranks two responses to a prompt as the verifier does: scalar in [0, 1].

    A pair counts with the difference of its outcomes; the result is the mean over groups, with 0.5
    for a group whose outcomes are all equal. `sequence_rewards` [N] are `implicit_rewards` summed
    over tokens. Of two equal ones the earlier row counts as the lower, as in the released code, so
    a PRM that still equals the reference need not score 0.5. Raises ValueError for partial groups
    and shapes that differ.
    """
    if sequence_rewards.shape != outcome_rewards.shape:
        raise ValueError(
            f"sequence_rewards: found shape {list(sequence_rewards.shape)}, wanted"
            f" {list(outcome_rewards.shape)}, that of outcome_rewards; take both from one batch"
        )
    rewards = by_group(sequence_rewards.detach(), group_size)
    outcomes = by_group(at_least_float32(outcome_rewards.detach()), group_size)
    difference = outcomes[:, :, None] - outcomes[:, None, :]  # [groups, K, K], row less column
    weights = difference.abs().triu(diagonal=1)  # each pair once, the earlier row first
    agrees = (rewards[:, :, None] > rewards[:, None, :]) == (difference > 0)
    total = weights.sum(dim=(1, 2))
    right = torch.where(agrees, weights, 0.0).sum(dim=(1, 2))
    return torch.where(total > 0, right / total, 0.5).mean()


def policy_metrics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    options: PolicyLossOptions,
) -> dict[str, float]:
    """How far the policy has moved from the one that sampled; inputs as in `clipped_policy_loss`.

    `clip_fraction`: share of tokens whose loss is a clipped one. `approx_kl`: token mean of
    old_logprobs - logprobs, the k1 estimate of KL(old || new) in nats, negative at times.
    `ratio_max`: the largest new / old probability of a token. Raises ValueError for shapes that
    differ and empty responses.
    """
    check_tokens(response_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    unclipped, losses = surrogate_losses(
        logprobs.detach(), old_logprobs, advantages, response_mask, options
    )
    log_ratio = _difference(logprobs, old_logprobs, response_mask)
    return {
        "clip_fraction": float(masked_mean(losses != unclipped, response_mask)),
        "approx_kl": float(masked_mean(-log_ratio, response_mask)),
        "ratio_max": float(log_ratio[response_mask].max().exp()),
    }


def mismatch_kl(
    old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor
) -> dict[str, float]:
    """How far the trainer's policy is from the rollout engine's copy of it; inputs are [N, T].

    `mismatch_kl`: token mean of the k3 estimate of KL(engine || trainer) in nats on the engine's
    own samples, exp(d) - 1 - d with d = old_logprobs - rollout_logprobs; never negative, 0 where
    both agree. `mismatch_max`: the largest |d|. Raises ValueError for shapes that differ and empty
    responses.
    """
    check_tokens(response_mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    gap = _difference(old_logprobs, rollout_logprobs, response_mask)
    return {
        "mismatch_kl": float(masked_mean(gap.expm1() - gap, response_mask)),
        "mismatch_max": float(gap.abs().max()),
    }


def ref_kl(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> dict[str, float]:
    """`ref_kl`: token mean of the k3 estimate of KL(policy || reference) in nats; inputs [N, T].

    Raises ValueError for shapes that differ and empty responses.
    """
    penalties = kl_penalties(logprobs.detach(), ref_logprobs, logprobs, response_mask, "k3")
    return {"ref_kl": float(masked_mean(penalties, response_mask))}


def return_metrics(
    process_rewards: Tensor | None, outcome_rewards: Tensor, response_mask: Tensor, gamma: float
) -> dict[str, float]:
    """Mean, unbiased standard deviation and largest |value| of the returns-to-go of all tokens.

    `process_return_*` of `process_rewards` [N, T], discounted by `gamma`; left out if they are
    None. `outcome_return_*` of `outcome_rewards` [N], which each token of a response has before it,
    undiscounted. Raises ValueError for shapes that differ and empty responses.
    """
    check_tokens(response_mask)
    check_rows(response_mask, outcome_rewards=outcome_rewards)
    figures = _spread("outcome_return", outcome_rewards.detach()[:, None], response_mask)
    if process_rewards is not None:
        check_tokens(response_mask, process_rewards=process_rewards)
        returns = returns_to_go(zero_padding(process_rewards.detach(), response_mask), gamma)
        figures |= _spread("process_return", returns, response_mask)
    return figures


def _spread(name: str, values: Tensor, response_mask: Tensor) -> dict[str, float]:
    return {
        f"{name}_mean": float(masked_mean(values, response_mask)),
        f"{name}_std": float(masked_variance(values, response_mask).sqrt()),
        f"{name}_abs_max": float(zero_padding(values, response_mask).abs().max()),
    }


def _difference(minuend: Tensor, subtrahend: Tensor, response_mask: Tensor) -> Tensor:
    subtrahend = zero_padding(subtrahend.detach(), response_mask)
    return zero_padding(minuend.detach(), response_mask) - subtrahend
