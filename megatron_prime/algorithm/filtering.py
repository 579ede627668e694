"""The accuracy window: train on prompts that the policy neither mostly fails nor mostly solves.

A group whose responses all earn the same has no outcome advantage, for each equals the mean of
the others. PRIME keeps prompts of middling accuracy and draws more until the batch is full. Two
more filters can be asked for: of groups without variance, which partly right answers may have
inside the window, too, and of groups with a response that was cut before its end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import by_group
from megatron_prime.config import FilterSection
from megatron_prime.types import VerifiedGroup, outcome_rewards

Reason = Literal["hard", "easy", "zero_variance", "truncated"]


def passes(group: VerifiedGroup, window: FilterSection) -> bool:
    """Whether a group may train."""
    return why_not(group, window) is None


def why_not(group: VerifiedGroup, window: FilterSection) -> Reason | None:
    """What keeps a group from training, the first in the order of `Reason`; None: nothing."""
    size, low, high = len(group.rollouts), window.min_accuracy, window.max_accuracy
    if not within_accuracy_window(outcome_rewards([group]), size, low, high):
        return "hard" if group.accuracy < low else "easy"
    if window.zero_variance == "drop" and len(set(group.outcome_rewards)) == 1:
        return "zero_variance"
    if window.truncated == "drop" and any(r.finish_reason == "length" for r in group.rollouts):
        return "truncated"
    return None


def within_accuracy_window(rewards: Tensor, group_size: int, low: float, high: float) -> Tensor:
    """Whether each group's mean outcome lies in [low, high]: bool [N / group_size].

    Both ends are inside, to within the rounding of `rewards`' own type and 1e-9 at least:
    a mean of 0.8 is 0.8 whether its parts were float64 or bfloat16. Raises ValueError for partial
    groups and for low > high.
    """
    if low > high:
        raise ValueError(
            f"found the accuracy window [{low}, {high}], wanted the lower end first; set"
            " filter.min_accuracy and filter.max_accuracy"
        )
    accuracy = by_group(rewards, group_size).double().mean(dim=1)
    rounding = torch.finfo(rewards.dtype).eps if rewards.is_floating_point() else 0
    tolerance = max(1e-9, rounding)
    return (accuracy >= low - tolerance) & (accuracy <= high + tolerance)
