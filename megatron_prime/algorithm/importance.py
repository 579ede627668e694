"""Truncated importance weights: undo what the rollout engine's numerics differ from the trainer's.

Tokens are sampled by the engine, whose kernels and number formats give them other probabilities
than the trainer has for the very same weights. The clipped surrogate compares the trainer with
itself and doesn't see that. A weight of trainer / engine probability, cut at a cap C, does:

    token      min(exp(d_t), C),              d_t = old_logprobs - rollout_logprobs
    sequence   min(exp(sum over t of d_t), C),  the same for all tokens of a response

The first is TIS (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training"): little variance, but it leaves the states as the engine visited them. The second is the
ratio of whole responses (Liu, Li et al. 2025, "When Speed Kills Stability"): right but for the
cut, and with a spread that grows with the length. Cutting large weights and leaving the others as
they are, not normalised, is Ionides (2008), "Truncated Importance Sampling".
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megatron_prime.algorithm.masked import check_tokens, masked_mean, zero_padding

Level = Literal["token", "sequence"]


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor, level: Level, cap: float
) -> Tensor:
    """The weight of each token's loss, [N, T], 0 on padding, without gradient.

    It depends on its own row alone, so that a batch may be cut anywhere between rows. Raises
    ValueError for shapes that differ and empty responses.
    """
    ratios = _ratios(old_logprobs, rollout_logprobs, response_mask, level)
    return zero_padding(ratios.clamp(max=cap), response_mask)


def importance_metrics(
    old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor, level: Level, cap: float
) -> dict[str, float]:
    """`importance_mean`: mean weight, after the cut; `importance_truncated`: share that was cut.

    Of response tokens (`token`) or of responses (`sequence`); inputs as in `importance_weights`.
    """
    ratios = _ratios(old_logprobs, rollout_logprobs, response_mask, level)
    counted = response_mask if level == "token" else response_mask.any(dim=1, keepdim=True)
    return {
        "importance_mean": float(masked_mean(ratios.clamp(max=cap), counted)),
        "importance_truncated": float(masked_mean(ratios > cap, counted)),
    }


def _ratios(
    old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor, level: Level
) -> Tensor:
    """Trainer / engine probability of tokens, [N, T], or of responses, [N, 1]."""
    check_tokens(response_mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    old = zero_padding(old_logprobs.detach(), response_mask)
    gap = old - zero_padding(rollout_logprobs.detach(), response_mask)
    return (gap if level == "token" else gap.sum(dim=1, keepdim=True)).exp()
