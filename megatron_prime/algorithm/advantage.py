"""PRIME's advantages: process and outcome rewards, each less what the group's others earned.

A token is credited with the process rewards still to come, its return-to-go, and with the
response's outcome; the baseline of both comes from the K - 1 other responses to the prompt. Paper
and released code differ in the process baseline, in normalising and in whitening; each difference
is an option, `AdvantageOptions.preset` names the two sets, docs/algorithm.md compares them. The
whole batch goes in at once: the result must not depend on how many ranks share it.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime.algorithm.masked import (
    at_least_float32,
    by_group,
    check_rows,
    check_tokens,
    masked_mean,
    whiten,
    zero_padding,
)
from megatron_prime.config import AdvantageOptions

__all__ = ["AdvantageOptions", "batch_norm", "prime_advantages", "returns_to_go"]


def prime_advantages(
    process_rewards: Tensor | None,
    outcome_rewards: Tensor,
    response_mask: Tensor,
    group_size: int,
    options: AdvantageOptions,
) -> Tensor:
    """Advantages of all tokens of a whole batch: [N, T], 0 on padding, without gradient.

    A_t = process_weight * sum_{s>=t} gamma^(s-t) c_s + outcome_weight * (r_o - mean of others'),
    then whitened if the options say so; c is the process reward less its baseline (Algorithm 1 of
    PRIME, or its released code). `process_rewards` [N, T] may be None when `process_weight` is 0;
    `outcome_rewards` is [N].

    Raises ValueError for a group_size below 2, partial groups, shapes that differ, empty responses
    and missing process rewards.
    """
    if group_size < 2:
        raise ValueError(
            f"found group_size {group_size}, wanted at least 2: leave-one-out needs another"
            " response to the same prompt; raise rollout.group_size"
        )
    check_tokens(response_mask)
    check_rows(response_mask, outcome_rewards=outcome_rewards)
    outcomes = at_least_float32(outcome_rewards.detach())
    outcome_advantages = outcomes - _mean_of_others(outcomes, group_size)
    advantages = options.outcome_weight * zero_padding(outcome_advantages[:, None], response_mask)
    if options.process_weight > 0:
        if process_rewards is None:
            raise ValueError(
                f"found no process rewards at process_weight {options.process_weight}, wanted a"
                " tensor [N, T]; set advantage.process_weight = 0 to train on the outcome alone"
            )
        check_tokens(response_mask, process_rewards=process_rewards)
        rewards = zero_padding(process_rewards.detach(), response_mask)
        if options.process_norm == "batch_norm":
            rewards = batch_norm(rewards)
        centred = _subtract_baseline(rewards, response_mask, group_size, options)
        advantages = advantages + options.process_weight * returns_to_go(centred, options.gamma)
    return whiten(advantages, response_mask) if options.whiten else advantages


def batch_norm(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Rewards [N, T], 0 on padding, over the largest |sum_{s>=t} r_s| of all rows and tokens."""
    return rewards / (returns_to_go(rewards, gamma=1.0).abs().max() + eps)


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{s>=t} gamma^(s-t) r_s of rewards [N, T] that are 0 on padding.

    Windows of 1, 2, 4 … tokens are joined until they cover T: log2(T) additions, and no division
    by powers of gamma, which would lose the far tokens.
    """
    returns, window = rewards.clone(), 1
    while window < rewards.shape[1]:
        returns[:, :-window] += gamma**window * returns[:, window:]
        window *= 2
    return returns


def _subtract_baseline(
    rewards: Tensor, response_mask: Tensor, group_size: int, options: AdvantageOptions
) -> Tensor:
    """Process rewards less their baseline; m_j is the mean token reward of response j."""
    means = masked_mean(rewards, response_mask, dim=1)
    if options.process_baseline == "paper":  # r - mean of the others' m
        centred = rewards - _mean_of_others(means, group_size)[:, None]
    else:  # the authors' code: K/(K-1) r - sum_j m_j / (K-1), j running over the own response too
        group_sums = by_group(means, group_size).sum(dim=1).repeat_interleave(group_size)
        centred = (group_size * rewards - group_sums[:, None]) / (group_size - 1)
    return zero_padding(centred, response_mask)


def _mean_of_others(values: Tensor, group_size: int) -> Tensor:
    """For each of [N] values, the mean of the other values of its group."""
    groups = by_group(values, group_size)
    return ((groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)).flatten()
