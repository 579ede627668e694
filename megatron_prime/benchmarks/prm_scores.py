"""One number for a response from the PRM's token rewards, to choose the best of several by.

r_t = beta * log(prm(y_t) / ref(y_t)) is PRIME's process reward (Eq. 3). `sum` is the whole
response's, the logit that the PRM is trained as; `min` is the worst token's, as a chain is as good
as its weakest link; `last` is the last token's.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.benchmarks.records import PrmScores


def prm_scores(
    prm_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> list[PrmScores]:
    """The scores of each response; the log-probs and the mask are [N, T]."""
    rewards = implicit_rewards(prm_logprobs.double(), ref_logprobs.double(), response_mask, beta)
    rows = [row[mask] for row, mask in zip(rewards, response_mask, strict=True)]
    return [PrmScores(float(row.min()), float(row.sum()), float(row[-1])) for row in rows]
