"""Where process rewards stand: at each token, at the end of each step, at the end of the response.

The implicit PRM rewards single tokens. A step's reward is the sum over its tokens, given at its
last one, and a response's is the sum over all; the sum over the response is the same in any case,
but a token is no longer told apart from the others of its step. Which tokens end a step is for
those to say who can read them (`data/steps.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_prime.algorithm.masked import check_tokens


def reward_places(
    response_mask: Tensor,
    granularity: Literal["token", "step", "response"],
    step_ends: Tensor | None = None,
) -> Tensor:
    """The tokens at which rewards stand: bool [N, T], a response's last token always among them.

    `step_ends` (bool [N, T]) is for `step` alone; what it holds on padding means nothing. Raises
    ValueError if it is missing or has another shape.
    """
    if granularity == "token":
        return response_mask
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (positions * response_mask).amax(dim=1, keepdim=True)
    ends = response_mask & (positions == last)
    if granularity == "response":
        return ends
    if step_ends is None:
        raise ValueError(
            'found no step ends at granularity "step", wanted a bool tensor [N, T]; set'
            ' advantage.granularity = "token" to do without'
        )
    check_tokens(response_mask, step_ends=step_ends)
    return ends | (response_mask & step_ends)


def gathered(rewards: Tensor, places: Tensor) -> Tensor:
    """Each reward moved to the next of the `places` at or behind it, and added up: [N, T].

    `rewards` [N, T] are 0 on padding, and the last token of each row is a place.
    """
    number = places.cumsum(dim=1) - places.long()  # of each token's step, from 0
    number = number.clamp(max=rewards.shape[1] - 1)  # padding behind T steps of one token
    sums = torch.zeros_like(rewards).scatter_add(1, number, rewards)
    return torch.where(places, sums.gather(1, number), 0.0)
