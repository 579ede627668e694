"""One number for a response from the PRM's token rewards, to choose the best of several by.

r_t = beta * log(prm(y_t) / ref(y_t)) is PRIME's process reward (Eq. 3). `sum` is the whole
response's, the logit that the PRM is trained as; `min` is the worst token's, as a chain is as good
as its weakest link; `last` is the last token's. A score that is no number could choose nothing,
and JSON has no word for it: it stops the evaluation before a file has seen it.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.benchmarks.records import EvaluationError, PrmScores


def prm_scores(
    prm_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> list[PrmScores]:
    """The scores of each response; the log-probs and the mask are [N, T].

    Raises EvaluationError, on every rank that asks, for token rewards that are not finite.
    """
    rewards = implicit_rewards(prm_logprobs.double(), ref_logprobs.double(), response_mask, beta)
    broken = ~rewards.isfinite().all(dim=1)  # padding is 0
    if bool(broken.any()):
        raise EvaluationError(
            f"evaluate.prm: found token rewards that are not finite in {int(broken.sum())} of "
            f"{len(broken)} responses, the first in number {int(broken.int().argmax())}; wanted "
            "finite log-probs of PRM and reference: look at the weights of evaluate.prm and "
            "evaluate.reference, and at precision.prm and precision.reference. The answers on "
            "disk stay as they are"
        )
    rows = [row[mask] for row, mask in zip(rewards, response_mask, strict=True)]
    return [PrmScores(float(row.min()), float(row.sum()), float(row[-1])) for row in rows]
