"""How long prompts and responses are expected to be, for a plan that has seen none of them.

Response lengths are drawn from a lognormal distribution, cut at `rollout.max_response_length`, with
a seed of its own: the same plan each time. The mean is that of the cut lengths, which a run logs as
`rollout/response_length_mean`, so a plan can be made again with the figure of a first step. Lengths
are independent of each other; those of one prompt's responses are not in reality.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Self

from megatron_prime.config import ConfigError, RunConfig

_SEED = 20250204


@dataclass(frozen=True, slots=True)
class Expectations:
    """What only a run can tell, and a plan has to assume."""

    mean_prompt: float
    mean_response: float
    sampled_per_kept: float  # prompts that are sampled for each one that passes the filter
    spread: float = 0.6  # standard deviation of the logarithm of response lengths

    @classmethod
    def of(
        cls,
        config: RunConfig,
        mean_prompt: float | None = None,
        mean_response: float | None = None,
        sampled_per_kept: float | None = None,
        spread: float = 0.6,
    ) -> Self:
        """With what is not given filled in: a quarter of the longest prompt, a third of the longest
        response, prompts as one round is meant to bring, or 2. Raises ConfigError."""
        knobs = config.rollout
        longest = (config.data.max_prompt_length, knobs.max_response_length)
        ratio = knobs.prompts_per_round / knobs.prompts_per_step
        usual = ratio if ratio > 1 else max(1.0, min(2.0, knobs.max_rounds * (ratio or 1)))
        found = cls(
            longest[0] / 4 if mean_prompt is None else mean_prompt,
            longest[1] / 3 if mean_response is None else mean_response,
            (ratio if ratio > 1 else max(1.0, usual))
            if sampled_per_kept is None
            else sampled_per_kept,
            spread,
        )
        limits = {
            "--mean-prompt": (found.mean_prompt, 1, longest[0]),
            "--mean-response": (found.mean_response, 1, longest[1]),
            "--sampled-per-kept": (found.sampled_per_kept, 1, math.inf),
            "--spread": (found.spread, 1e-3, 3),
        }
        for name, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise ConfigError(f"{name}: found {value:g}, wanted {least:g} to {most:g}")
        return found


@lru_cache(maxsize=64)
def response_lengths(count: int, mean: float, spread: float, most: int) -> tuple[int, ...]:
    """`count` lengths between 1 and `most`, in the order they are asked for."""
    if mean >= most:
        return (most,) * count
    mu = _location(mean, spread, most)
    generator = random.Random(_SEED)
    drawn = (generator.lognormvariate(mu, spread) for _ in range(count))
    return tuple(min(most, max(1, round(length))) for length in drawn)


def _location(mean: float, spread: float, most: int) -> float:
    """The lognormal's parameter that gives cut lengths this mean, by bisection."""
    low, high = math.log(mean) - spread**2, math.log(most) + 10 * spread
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle, spread, most) < mean else (low, middle)
    return low


def _cut_mean(mu: float, spread: float, most: int) -> float:
    """Mean of min(X, most) of a lognormal X."""
    normal, end = NormalDist(), (math.log(most) - mu) / spread
    below = math.exp(mu + spread**2 / 2) * normal.cdf(end - spread)
    return below + most * (1 - normal.cdf(end))
