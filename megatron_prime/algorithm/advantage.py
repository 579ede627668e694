"""PRIME's advantages: process and outcome rewards, each compared as the estimator says, then added.

A token is credited with the process rewards still to come, its return-to-go, and with the
response's outcome. What both are compared with is `AdvantageOptions.estimator`: with the other
responses to the prompt (RLOO, the paper's choice), with the group in units of its spread (GRPO),
with nothing (REINFORCE), or with the implicit value of what precedes the token; `gae.py` compares
them with a critic's values (PPO). Paper and released code differ in RLOO's process baseline, in
normalising and in whitening; each difference is an option, `AdvantageOptions.preset` names the two
sets, docs/algorithm.md compares them. The whole batch goes in at once: the result must not depend
on how many ranks share it.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime.algorithm.granularity import gathered, reward_places
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

__all__ = ["AdvantageOptions", "batch_norm", "placed_rewards", "prime_advantages", "returns_to_go"]

_OF_GROUPS = ("rloo", "grpo")  # estimators that compare a response with others to its prompt


def prime_advantages(
    process_rewards: Tensor | None,
    outcome_rewards: Tensor,
    response_mask: Tensor,
    group_size: int,
    options: AdvantageOptions,
    step_ends: Tensor | None = None,
    learns: Tensor | None = None,
) -> Tensor:
    """Advantages of all tokens of a whole batch: [N, T], 0 on padding, without gradient.

    A_t = process_weight * sum_{s>=t} gamma^(s-t) c_s + outcome_weight * b, then whitened if the
    options say so. With o the outcome reward, r_s the process rewards (gathered as `granularity`
    says) and m_j their mean in response j:

        rloo         b = o - mean of the others' o             c = r - mean of the others' m
        grpo         b = (o - mean of o) / (std of o + 1e-6)   c = (r - mean of m) / (std of m + …)
        reinforce    b = o                                     c = r
        prime_value  b = o, and the first sum is replaced by -sum_{s<t} r_s

    (PRIME Algorithm 1, Eq. 7, Eq. 8 and "PRIME as value model"; RLOO's released c is told in
    `_compared`.) `process_rewards` [N, T] may be None when `process_weight` is 0;
    `outcome_rewards` is [N]; `step_ends` [N, T] is asked for by `granularity = "step"`.
    `learns` (bool [N]) says which rows have a loss: the others are in all of this, but not in the
    mean and deviation of whitening, or what is trained would not be centred.

    Raises ValueError for a group_size below 2 where a group is needed, partial groups, shapes that
    differ, empty responses, missing process rewards and missing step ends; and for `gae`, which
    needs a critic's values (`gae.gae_advantages`).
    """
    if options.estimator == "gae":
        raise ValueError(
            'found advantage.estimator = "gae" without values, wanted a critic\'s; call '
            "gae_advantages"
        )
    if options.estimator in _OF_GROUPS and group_size < 2:
        raise ValueError(
            f"found group_size {group_size}, wanted at least 2: advantage.estimator ="
            f' "{options.estimator}" compares a response with others to the same prompt; raise'
            " rollout.group_size"
        )
    check_tokens(response_mask)
    check_rows(response_mask, outcome_rewards=outcome_rewards)
    outcomes = _compared_outcomes(at_least_float32(outcome_rewards.detach()), group_size, options)
    advantages = options.outcome_weight * zero_padding(outcomes[:, None], response_mask)
    if options.process_weight > 0:
        rewards, places = placed_rewards(process_rewards, response_mask, options, step_ends)
        if options.estimator == "prime_value":
            part = -zero_padding(rewards.cumsum(dim=1) - rewards, response_mask)
        else:
            compared = _compared(rewards, places, response_mask, group_size, options)
            part = returns_to_go(compared, options.gamma)
        advantages = advantages + options.process_weight * part
    return whiten(advantages, response_mask, learns) if options.whiten else advantages


def placed_rewards(
    process_rewards: Tensor | None,
    response_mask: Tensor,
    options: AdvantageOptions,
    step_ends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Process rewards gathered as `granularity` says and normed, and where they stand: [N, T] each.

    Without gradient, 0 elsewhere. Raises ValueError for missing ones and shapes that differ.
    """
    if process_rewards is None:
        raise ValueError(
            f"found no process rewards at process_weight {options.process_weight}, wanted a"
            " tensor [N, T]; set advantage.process_weight = 0 to train on the outcome alone"
        )
    check_tokens(response_mask, process_rewards=process_rewards)
    places = reward_places(response_mask, options.granularity, step_ends)
    rewards = gathered(zero_padding(process_rewards.detach(), response_mask), places)
    return batch_norm(rewards) if options.process_norm == "batch_norm" else rewards, places


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


def _compared_outcomes(outcomes: Tensor, group_size: int, options: AdvantageOptions) -> Tensor:
    """The outcome advantage of each response, [N]."""
    if options.estimator == "rloo":
        return outcomes - _mean_of_others(outcomes, group_size)
    if options.estimator == "grpo":
        mean, scale = _mean_and_scale(outcomes, group_size, options.group_std)
        return (outcomes - mean) / scale
    return outcomes


def _compared(
    rewards: Tensor,
    places: Tensor,
    response_mask: Tensor,
    group_size: int,
    options: AdvantageOptions,
) -> Tensor:
    """Process rewards less what the estimator compares them with: [N, T].

    m_j is the mean of response j's rewards over the places where they stand. The authors' code,
    `process_baseline = "released"`, has K/(K-1) r - sum_j m_j / (K-1) in RLOO, j running over the
    own response too, and takes m and the baseline at all tokens, whatever the granularity.
    """
    if options.estimator == "reinforce":
        return rewards
    released = options.estimator == "rloo" and options.process_baseline == "released"
    at = response_mask if released else places
    means = masked_mean(rewards, at, dim=1)
    if released:
        group_sums = by_group(means, group_size).sum(dim=1).repeat_interleave(group_size)
        compared = (group_size * rewards - group_sums[:, None]) / (group_size - 1)
    elif options.estimator == "rloo":
        compared = rewards - _mean_of_others(means, group_size)[:, None]
    else:
        mean, scale = _mean_and_scale(means, group_size, options.group_std)
        compared = (rewards - mean[:, None]) / scale[:, None]
    return zero_padding(compared, at)


def _mean_of_others(values: Tensor, group_size: int) -> Tensor:
    """For each of [N] values, the mean of the other values of its group."""
    groups = by_group(values, group_size)
    return ((groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)).flatten()


def _mean_and_scale(
    values: Tensor, group_size: int, std: bool, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """For each of [N] values, the mean of its group and its unbiased deviation + eps, or 1.

    In float64, or rounding of a mean of equal values would be blown up by 1 / eps.
    """
    groups = by_group(values, group_size).double()
    mean = groups.mean(dim=1).repeat_interleave(group_size)
    scale = groups.std(dim=1) + eps if std else groups.new_ones(len(groups))
    return mean.to(values.dtype), scale.repeat_interleave(group_size).to(values.dtype)
