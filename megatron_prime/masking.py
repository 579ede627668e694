"""Which responses a batch is learnt from: all, or with `filter.truncated = "mask"` the ended ones.

A response that was cut has earned its reward for not being done. It stays in its group's baseline,
but neither policy nor critic has a loss of it, and advantages are whitened by the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prime.errors import RunError


def ended(finish_reasons: Sequence[str]) -> Tensor:
    """Of each response, whether it came to its end: bool [N]; RunError if none did."""
    found = torch.tensor([reason != "length" for reason in finish_reasons])
    if not found.any():
        raise RunError(
            f"found all {len(found)} responses of a batch cut at rollout.max_response_length, "
            'wanted one that ended: with filter.truncated = "mask" nothing is left to learn from; '
            'raise rollout.max_response_length, or set filter.truncated = "keep"'
        )
    return found
