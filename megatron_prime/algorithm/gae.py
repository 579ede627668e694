"""PPO's advantages: rewards still to come, compared with what a critic expected of them.

A critic V(y_<t) predicts, before each token, the sum of the rewards from there on. A token's
reward is its process reward (placed and normed as `advantage.py` says) and, at the last token, the
outcome. With V = 0 after the last token,

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = sum_{s>=t} (gamma lambda)^(s-t) delta_s        (Schulman et al., arXiv 1506.02438)
    G_t     = A_t + V_t

lambda = 1 is the return less the value, without bias; lambda = 0 the single delta. The critic
learns G: what it predicts is what it is compared with. One critic stands for both rewards, as in
the authors' code, whose GAE runs over their sum; the paper prints no formula for PPO with PRIME.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prime.algorithm.advantage import placed_rewards, returns_to_go
from megatron_prime.algorithm.granularity import reward_places
from megatron_prime.algorithm.masked import check_rows, check_tokens, whiten, zero_padding
from megatron_prime.config import AdvantageOptions


def gae_advantages(
    process_rewards: Tensor | None,
    outcome_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor,
    options: AdvantageOptions,
    step_ends: Tensor | None = None,
    learns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of all tokens of a batch, returns, and rewards to come: [N, T], 0 on padding.

    No gradient runs through them. `values` [N, T] are the critic's before it is updated; the others
    are those of `advantage.prime_advantages`. `whiten` changes the advantages alone. Rewards to
    come are the returns at lambda = 1, whatever lambda is: no value is in them.

    Raises ValueError for shapes that differ, empty responses, missing process rewards or step ends.
    """
    check_tokens(response_mask, values=values)
    check_rows(response_mask, outcome_rewards=outcome_rewards)
    at_the_end = reward_places(response_mask, "response", None)
    rewards = options.outcome_weight * zero_padding(outcome_rewards.detach()[:, None], at_the_end)
    if options.process_weight > 0:
        placed, _ = placed_rewards(process_rewards, response_mask, options, step_ends)
        rewards = rewards + options.process_weight * placed
    expected = zero_padding(values.detach(), response_mask)
    after = torch.cat([expected[:, 1:], torch.zeros_like(expected[:, :1])], dim=1)
    surprises = zero_padding(rewards + options.gamma * after - expected, response_mask)
    advantages = returns_to_go(surprises, options.gamma * options.gae_lambda)
    returns = advantages + expected
    if options.whiten:
        advantages = whiten(advantages, response_mask, learns)
    return advantages, returns, returns_to_go(rewards, options.gamma)
