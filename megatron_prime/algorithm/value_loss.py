"""What a critic learns from: half the squared distance of its values from the returns, clipped.

    L = mean over tokens of max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2

V_old are the values of before the update. Where V has moved more than c from there towards G, the
clipped term is the larger one and constant: no gradient. Where it has moved away from G, the
unclipped one is, and leads it back (Schulman et al.'s PPO code; c = `critic.value_clip`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import (
    at_least_float32,
    check_tokens,
    masked_mean,
    masked_variance,
    zero_padding,
)

_ROUNDING = 1e-5  # relative, of float32 sums over a response: equal returns differ by less


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip: float | None
) -> Tensor:
    """The loss of [N, T] values, a scalar. Raises ValueError for shapes that differ."""
    check_tokens(response_mask, values=values, old_values=old_values, returns=returns)
    plain, clipped = _squares(values, old_values, returns, response_mask, clip)
    return masked_mean(torch.maximum(plain, clipped), response_mask) / 2


def value_metrics(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip: float | None
) -> dict[str, float]:
    """`clip_fraction`: share of tokens whose loss is the clipped one."""
    plain, clipped = _squares(values, old_values, returns, response_mask, clip)
    return {"clip_fraction": masked_mean((clipped > plain).float(), response_mask).item()}


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over all tokens: 1 of a perfect critic, 0 of a constant, less of a
    worse one; 0 where all returns are equal, to within the rounding of their sums.

    G must have no V in it, or a critic is praised for agreeing with itself.
    """
    known, found = (zero_padding(x.double(), response_mask) for x in (returns, values))
    spread = masked_variance(known, response_mask)
    size = masked_mean(known.square(), response_mask).clamp(min=1.0)
    if spread <= _ROUNDING**2 * size:
        return 0.0
    return (1 - masked_variance(known - found, response_mask) / spread).item()


def _squares(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Squared distances from the returns of the values, and of the clipped values: [N, T]."""
    now, before, wanted = (
        zero_padding(values, mask),
        zero_padding(old_values.detach(), mask),
        zero_padding(at_least_float32(returns.detach()), mask),
    )
    plain = (now - wanted).square()
    if clip is None:
        return plain, plain
    return plain, (before + (now - before).clamp(-clip, clip) - wanted).square()
