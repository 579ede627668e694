"""One number for a response from the PRM's token rewards, to choose the best of several by.

r_t = beta * log(prm(y_t) / ref(y_t)) is PRIME's process reward (Eq. 3). `sum` is the whole
response's, the logit that the PRM is trained as; `min` is the worst token's, as a chain is as good
as its weakest link; `last` is the last token's.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime.benchmarks.records import PrmScores


def prm_scores(token_rewards: Tensor, response_mask: Tensor) -> list[PrmScores]:
    """The scores of each response; rewards and mask are [N, T]."""
    rows = [row[mask] for row, mask in zip(token_rewards, response_mask, strict=True)]
    return [PrmScores(float(row.min()), float(row.sum()), float(row[-1])) for row in rows]
