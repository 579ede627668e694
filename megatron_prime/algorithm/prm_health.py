"""How well the PRM is: does its reward mean what it should, and where does it come from.

The sequence reward R is the logit of "this response is right", so sigmoid(R) can be held against
what the verifier says. A PRM that grows blind shows it early: it pays for length, puts everything
on the last tokens, or thinks better of the policy's responses than the verifier does, which is what
over-optimisation looks like. Nothing here has gradients or changes training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import (
    at_least_float32,
    check_rows,
    check_tokens,
    masked_sum,
    zero_padding,
)

BINS = 15  # an odd number, so that an untrained PRM's 0.5 lies inside a bin and not between two
LAST = 10  # the last tokens of a response are one in ten, rounded up


def prm_health(
    process_rewards: Tensor, outcome_rewards: Tensor, response_mask: Tensor
) -> dict[str, float]:
    """Figures of token rewards [N, T], beta * log(prm / ref), and outcomes [N] of a batch.

    `predicted_accuracy`: mean sigmoid(R). `over_optimisation_gap`: that less the mean outcome.
    `calibration_error`: mean distance of mean sigmoid(R) and mean outcome in bins of sigmoid(R),
    weighted by their responses. `length_correlation`: Pearson's, of R and the number of tokens; 0
    where either does not vary. `last_tokens_share`: of all |r|, that of each response's last tenth.
    `reward_right_mean`, `_std`, `reward_wrong_mean`, `_std`: of R where the outcome is 1, and where
    it is not; left out where there are none. Raises ValueError for shapes that differ and empty
    responses.
    """
    check_tokens(response_mask, process_rewards=process_rewards)
    check_rows(response_mask, outcome_rewards=outcome_rewards)
    rewards = zero_padding(process_rewards.detach(), response_mask)
    outcomes = at_least_float32(outcome_rewards.detach())
    sums = rewards.sum(dim=1)
    chances, right = sums.sigmoid(), outcomes >= 1
    return {
        "predicted_accuracy": float(chances.mean()),
        "over_optimisation_gap": float(chances.mean() - outcomes.mean()),
        "calibration_error": calibration_error(chances, outcomes),
        "length_correlation": correlation(sums, response_mask.sum(dim=1)),
        "last_tokens_share": last_tokens_share(rewards, response_mask),
        **_spread("reward_right", sums[right]),
        **_spread("reward_wrong", sums[~right]),
    }


def calibration_error(chances: Tensor, outcomes: Tensor) -> float:
    """Expected calibration error of `chances` [N] in equal bins: sum_b |sum_b (p - o)| / N."""
    bins = (chances * BINS).long().clamp(0, BINS - 1)
    differences = chances.double() - outcomes.double()
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, differences)
    return float(gaps.abs().sum() / len(chances))


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of two [N]; 0 where either does not vary."""
    a, b = (values.double() - values.double().mean() for values in (one, other))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def last_tokens_share(rewards: Tensor, response_mask: Tensor) -> float:
    """Of the absolute rewards [N, T], the part on each response's last tenth; 0 if all are 0."""
    lengths = response_mask.sum(dim=1, keepdim=True)
    place = response_mask.cumsum(dim=1)  # 1 at the first token
    last = response_mask & (place > lengths - (lengths + LAST - 1) // LAST)
    whole = masked_sum(rewards.abs(), response_mask)
    return float(masked_sum(rewards.abs(), last) / whole) if whole > 0 else 0.0


def _spread(name: str, values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    std = values.std() if len(values) > 1 else torch.zeros(())
    return {f"{name}_mean": float(values.mean()), f"{name}_std": float(std)}
