"""The clipped surrogate: follow the advantage, but gain nothing from going far off the old policy.

The ratio of new to old probability weights each token's advantage. Where it has left
[1 - clip, 1 + clip_high] in the direction that the advantage rewards, the clipped loss is the
larger one and the token has no gradient. The other direction has no end: a bad token whose
probability has grown a lot is pushed down with all its ratio, unless `dual_clip` bounds its loss.
Token losses are averaged within each response and then over responses (the released run, which put
one response into a micro-batch), or over all tokens at once. A KL divergence from the reference may
be added; its three estimators of a token agree in value, in expectation, but not in gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import check_tokens, masked_mean, zero_padding
from megatron_prime.config import PolicyLossOptions

__all__ = [
    "PolicyLossOptions",
    "aggregate",
    "clipped_policy_loss",
    "kl_penalties",
    "surrogate_losses",
]


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    options: PolicyLossOptions,
    weights: Tensor | None = None,
) -> Tensor:
    """Scalar mean of w max(-A ratio, -A clip(ratio)), ratio = exp(logprobs - old_logprobs).

    With `dual_clip` = c, it is w min(max(…), -c A) where A < 0 (Ye et al. 2020, "Mastering Complex
    Control in MOBA Games with Deep Reinforcement Learning", Eq. 5).

    All inputs are [N, T]; only `logprobs` receives a gradient. The `weights` w are those of
    `algorithm/importance.py`; without them all are 1. To split a mini-batch, weight each part's
    loss with its share of the rows (`seq_mean_token_mean`) or of the tokens (`token_mean`).
    The entropy bonus and the KL divergence are not part of it. Raises ValueError for shapes that
    differ and empty responses.
    """
    check_tokens(response_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _, losses = surrogate_losses(logprobs, old_logprobs, advantages, response_mask, options)
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
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    options: PolicyLossOptions,
) -> tuple[Tensor, Tensor]:
    """Token losses without any clip, -A ratio, and those that count: [N, T] each, 0 on padding."""
    old = zero_padding(old_logprobs.detach(), response_mask)
    ratio = (zero_padding(logprobs, response_mask) - old).exp()
    weights = zero_padding(advantages.detach(), response_mask)
    high = options.clip if options.clip_high is None else options.clip_high
    unclipped = -weights * ratio
    losses = torch.maximum(unclipped, -weights * ratio.clamp(1 - options.clip, 1 + high))
    if options.dual_clip is not None:
        bounded = torch.minimum(losses, -options.dual_clip * weights)
        losses = torch.where(weights < 0, bounded, losses)
    return unclipped, losses


def kl_penalties(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    response_mask: Tensor,
    estimator: Literal["k1", "k2", "k3"],
) -> Tensor:
    """Estimates of KL(policy || reference) by tokens that `old_logprobs` sampled: [N, T].

    With d = logprobs - ref_logprobs and ratio = exp(logprobs - old_logprobs), all [N, T]; only
    `logprobs` receives a gradient, g = d logprobs:

        k1  ratio d            gradient ratio (d + 1) g: in expectation that of KL(policy || ref),
                               also when the policy has left the old one
        k2  d² / 2             gradient d g: the same in expectation, as long as it has not
        k3  exp(-d) - 1 + d    gradient (1 - exp(-d)) g: that of KL(ref || policy), and the
                               estimate is never negative

    Without the ratio, k1 would have the gradient g, whose expectation is 0. (Schulman 2020,
    "Approximating KL Divergence", has the estimators; the gradients follow by differentiation.)
    Raises ValueError for shapes that differ and empty responses.
    """
    check_tokens(
        response_mask, logprobs=logprobs, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs
    )
    inside = zero_padding(logprobs, response_mask)
    d = inside - zero_padding(ref_logprobs.detach(), response_mask)
    if estimator == "k1":
        return (inside - zero_padding(old_logprobs.detach(), response_mask)).exp() * d
    if estimator == "k2":
        return d.square() / 2
    return (-d).expm1() + d
