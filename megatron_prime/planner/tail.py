"""What the long tail of response lengths costs generation, and what sampling more prompts saves.

A round lasts as long as its last response, and servers that are done wait for it. The same rounds
are run through (`decoding.py`) for lengths of several spreads, and for three ways to get the
prompts that a step needs, s times as many as it trains on:

    rounds    as many at a time as the step trains on (prompts_per_round = prompts_per_step)
    at once   all in one round
    surplus   a quarter more in one round, aborted when enough are answered (rollout.abort_surplus)

The third trains on what was answered first, so on shorter responses: their mean is told beside it.
Whether a prompt passes the filter is taken to have nothing to do with its responses' lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from megatron_prime.planner.decoding import Generation
from megatron_prime.planner.generation import Rollouts

SPREADS = (0.3, 0.6, 0.9, 1.2)
_SURPLUS = 1.25


@dataclass(frozen=True, slots=True)
class Tail:
    """A step's generation, one way."""

    spread: float
    way: str
    prompts_per_round: int
    abort_surplus: bool
    seconds: float
    idle: float  # share of the servers' time in which a server had nothing left to do
    half: float  # part of the rounds' time after which half of the groups that they answered were
    mean_response: float  # of the groups that were answered


def tails(rollouts: Rollouts) -> Iterator[Tail]:
    """All spreads and ways."""
    for spread in SPREADS:
        expected = replace(rollouts.expected, spread=spread)
        goal = rollouts.config.rollout.prompts_per_step
        needed = ceil(expected.sampled_per_kept * goal)
        ways = {
            "rounds": (goal, False),
            "at once": (needed, False),
            "surplus": (ceil(_SURPLUS * needed), True),
        }
        for way, (prompts, abort) in ways.items():
            knobs = {"prompts_per_round": prompts, "abort_surplus": abort}
            options = rollouts.config.rollout.model_copy(update=knobs)
            config = rollouts.config.model_copy(update={"rollout": options})
            one = replace(rollouts, config=config, expected=expected)
            yield _tail(one, way)


def _tail(rollouts: Rollouts, way: str) -> Tail:
    knobs, rounds = rollouts.config.rollout, rollouts.rounds_of_step()
    seconds = sum(end for _, end in rounds)
    waited = sum(max(0.0, end - own) for one, end in rounds for own in one.finished)
    servers = len(rounds[0][0].finished)
    answered = rollouts.answered()
    lengths = [length for group in answered for length in group]
    half = sum(one.until(_complete(one, end) // 2) for one, end in rounds)
    return Tail(
        spread=rollouts.expected.spread,
        way=way,
        prompts_per_round=knobs.prompts_per_round,
        abort_surplus=knobs.abort_surplus,
        seconds=seconds,
        idle=waited / (servers * seconds),
        half=half / seconds,
        mean_response=sum(lengths) / len(lengths),
    )


def _complete(one: Generation, end: float) -> int:
    """Groups that were answered before the round ended or was aborted."""
    return sum(done <= end for done in one.done)
