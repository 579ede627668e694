"""The accuracy window: train on prompts that the policy neither mostly fails nor mostly solves.

A group whose responses all earn the same has no outcome advantage, for each equals the mean of
the others. PRIME keeps prompts of middling accuracy and draws more until the batch is full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import by_group
from megatron_prime.config import FilterSection
from megatron_prime.types import VerifiedGroup, outcome_rewards


def passes(group: VerifiedGroup, window: FilterSection) -> bool:
    """Whether a group may train."""
    size, low, high = len(group.rollouts), window.min_accuracy, window.max_accuracy
    return bool(within_accuracy_window(outcome_rewards([group]), size, low, high))


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
