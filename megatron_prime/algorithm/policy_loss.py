"""The clipped surrogate: follow the advantage, but gain nothing from going far off the old policy.

The ratio of new to old probability weights each token's advantage. Where it has left
[1 - clip, 1 + clip] in the direction that the advantage rewards, the clipped loss is the larger one
and the token has no gradient. Token losses are averaged within each response and then over
responses (the released run, which put one response into a micro-batch), or over all tokens at once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import check_tokens, masked_mean, zero_padding
from megatron_prime.config import PolicyLossOptions

__all__ = ["PolicyLossOptions", "aggregate", "clipped_policy_loss", "surrogate_losses"]


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    options: PolicyLossOptions,
    weights: Tensor | None = None,
) -> Tensor:
    """Scalar mean of w max(-A ratio, -A clip(ratio)), ratio = exp(logprobs - old_logprobs).

    All inputs are [N, T]; only `logprobs` receives a gradient. The `weights` w are those of
    `algorithm/importance.py`; without them all are 1. To split a mini-batch, weight each part's
    loss with its share of the rows (`seq_mean_token_mean`) or of the tokens (`token_mean`).
    The entropy bonus is not part of it. Raises ValueError for shapes that differ and empty
    responses.
    """
    check_tokens(response_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    unclipped, clipped = surrogate_losses(
        logprobs, old_logprobs, advantages, response_mask, options.clip
    )
    losses = torch.maximum(unclipped, clipped)
    if weights is not None:
        check_tokens(response_mask, weights=weights)
        losses = losses * zero_padding(weights.detach(), response_mask)
    return aggregate(losses, response_mask, options.aggregation)


def aggregate(
    token_values: Tensor,
    response_mask: Tensor,
    aggregation: Literal["seq_mean_token_mean", "token_mean"],
) -> Tensor:
    """Scalar mean of token values [N, T]: of each response, then over responses; or of all tokens.

    The entropy bonus is averaged with it too, so that it keeps its weight against the loss.
    """
    if aggregation == "token_mean":
        return masked_mean(token_values, response_mask)
    return masked_mean(token_values, response_mask, dim=1).mean()


def surrogate_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Token losses -A ratio and -A clip(ratio), [N, T], 0 on padding; the larger one counts."""
    old = zero_padding(old_logprobs.detach(), response_mask)
    ratio = (zero_padding(logprobs, response_mask) - old).exp()
    weights = zero_padding(advantages.detach(), response_mask)
    return -weights * ratio, -weights * ratio.clamp(1 - clip, 1 + clip)
