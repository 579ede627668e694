"""The PRM's only teacher is the outcome: cross-entropy of the whole response's implicit reward.

The sequence reward R, a sum over tokens, is the logit of "this response is right". No token is
labelled and nothing is divided by the length; the gradient with respect to each token's log-prob
is beta (sigmoid(R) - r_o) / N. The loss is computed from the logit: through a float32 sigmoid it
would lose its gradient where |R| is above about 17.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.masked import at_least_float32, check_rows


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
    sequence_rewards = implicit_rewards(prm_logprobs, ref_logprobs, response_mask, beta).sum(dim=1)
    labels = at_least_float32(outcome_rewards)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(
            f"outcome_rewards: found values from {float(labels.min())} to {float(labels.max())},"
            " wanted [0, 1], for they are cross-entropy labels; rescale what the verifier gives"
        )
    log_right, log_wrong = logsigmoid(sequence_rewards), logsigmoid(-sequence_rewards)
    return -(labels * log_right + (1 - labels) * log_wrong).mean()
