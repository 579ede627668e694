"""From scored responses to pass@k, avg@k, maj@k and best-of-N, each with a bootstrap interval.

A response is right if it scored 1; half-right programs are wrong here. Of a problem's n samples
with c right ones:

    avg@n    c / n
    pass@k   1 - C(n-c, k) / C(n, k): the unbiased estimate of "one of k is right" (Chen et al.,
             arXiv 2107.03374, Eq. 1)
    maj@k    whether the answer that most of the first k samples give is right. Answers are equal
             if their text is, `answers.normalized`; a response without an answer has no vote; of
             answers with equally many votes the one that was given first wins
    best@k   whether the sample with the highest PRM score among the first k is right; of equal
             scores the first

Intervals are 95 % percentile intervals over problems drawn with replacement: they say how much
depends on which problems a benchmark happens to have. All metrics of a set share the same draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from megatron_prime.benchmarks.records import AGGREGATES, Record

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over problems, and its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, have a right one among them."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(answers: Sequence[str | None]) -> int | None:
    """The first sample that gives the answer which most give; None if none gives any."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    # Counter keeps the order in which answers came first, and max takes the first of equals.
    return list(answers).index(max(votes, key=lambda answer: votes[answer]))


def sizes(n: int) -> list[int]:
    """The powers of two below n, and n."""
    return sorted({1 << i for i in range(n.bit_length()) if 1 << i < n} | {n})


def of_problem(record: Record, has_answers: bool) -> dict[str, float]:
    """A problem's metrics by name; `has_answers`: whether votes can be counted."""
    right = [response.score == 1.0 for response in record.responses]
    n = len(right)
    found = {f"avg@{n}": sum(right) / n}
    found |= {f"pass@{k}": pass_at_k(n, sum(right), k) for k in sizes(n) if k > 1}
    if has_answers:
        answers = [response.answer for response in record.responses]
        for k in (k for k in sizes(n) if k > 1):
            winner = majority(answers[:k])
            found[f"maj@{k}"] = float(winner is not None and right[winner])
    scores = [response.prm for response in record.responses if response.prm is not None]
    if len(scores) == n:
        for name in AGGREGATES:
            values = [getattr(score, name) for score in scores]
            for k in (k for k in sizes(n) if k > 1):
                found[f"best@{k} ({name})"] = float(right[values.index(max(values[:k]))])
    return found


def summarize(problems: Sequence[dict[str, float]], seed: int) -> dict[str, Figure]:
    """Each metric's mean over problems, with its interval."""
    names = list(problems[0])
    table = np.array([[problem[name] for name in names] for problem in problems])
    low, high = bootstrap(table, seed)
    return {
        name: Figure(float(table[:, i].mean()), float(low[i]), float(high[i]))
        for i, name in enumerate(names)
    }


def bootstrap(
    table: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % percentile intervals of the columns' means; `table`: [problems, metrics]."""
    rng, rows = np.random.default_rng(seed), len(table)
    means = np.concatenate(
        [
            rng.multinomial(rows, [1 / rows] * rows, size=count) @ table / rows
            for count in _parts(resamples, 1000)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def _parts(whole: int, part: int) -> list[int]:
    return [min(part, whole - start) for start in range(0, whole, part)]
