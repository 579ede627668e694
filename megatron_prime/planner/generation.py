"""Seconds of the rounds in which a run's prompts are answered, from its configuration.

`decoding.py` runs through one round; here is what the servers of a run are like, how many rounds
there are, and what of the last one `rollout.abort_surplus` saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.decoding import Generation, Server, generate
from megatron_prime.planner.engine_bytes import (
    cache_bytes_per_token,
    engine_tp,
    longest_sequence,
    weight_bytes,
)
from megatron_prime.planner.flops import linear_values
from megatron_prime.planner.lengths import Expectations, response_lengths
from megatron_prime.planner.rates import Rates
from megatron_prime.planner.states import VALUE_BYTES
from megatron_prime.planner.training import Seconds, add, times
from megatron_prime.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Rollouts:
    """A run's engine at work."""

    config: RunConfig
    shape: ModelShape
    world_size: int
    cache_bytes: int  # of keys and values, on each rank
    rates: Rates
    expected: Expectations

    def of_step(self) -> Seconds:
        """All rounds of a step. Raises ConfigError if there are more than a run allows."""
        return add(*(times(one.by, end / one.seconds) for one, end in self.rounds_of_step()))

    def rounds_of_step(self) -> list[tuple[Generation, float]]:
        """Each round, and the seconds after which it ended or was aborted."""
        knobs = self.config.rollout
        prompts = knobs.prompts_per_round or knobs.prompts_per_step
        rounds, needed = rounds_of(self.config, self.expected.sampled_per_kept)
        found = [self.round(prompts, knobs.group_size, number) for number in range(rounds)]
        ends = [one.seconds for one in found]
        if knobs.abort_surplus:
            ends[-1] = found[-1].until(needed)
        return list(zip(found, ends, strict=True))

    def answered(self) -> list[tuple[int, ...]]:
        """Lengths of the groups that were complete when their round ended, in the order asked."""
        knobs, expected, rounds = self.config.rollout, self.expected, self.rounds_of_step()
        size, most = knobs.group_size, knobs.max_response_length
        count = sum(len(one.done) for one, _ in rounds) * size
        lengths = response_lengths(count, expected.mean_response, expected.spread, most)
        ended = [done <= end for one, end in rounds for done in one.done]
        groups = (lengths[first : first + size] for first in range(0, count, size))
        return [group for group, complete in zip(groups, ended, strict=True) if complete]

    def trained(self) -> tuple[int, ...]:
        """Lengths of the responses that a step trains on: with `abort_surplus` of those that were
        answered in time, which are shorter. What passes the filter is taken evenly from all."""
        knobs, expected = self.config.rollout, self.expected
        goal, most = knobs.prompts_per_step, knobs.max_response_length
        if not knobs.abort_surplus or self.config.debug.rollouts_from is not None:
            count = goal * knobs.group_size
            return response_lengths(count, expected.mean_response, expected.spread, most)
        groups = self.answered()
        kept = (groups[number * len(groups) // goal] for number in range(goal))
        return tuple(length for group in kept for length in group)

    def round(self, prompts: int, group_size: int, number: int = 0) -> Generation:
        """Round `number` of a step."""
        return _round(
            self._server(prompts, group_size),
            self._servers(),
            prompts,
            group_size,
            number,
            self.expected,
            self.config.rollout.max_response_length,
            self.rates,
        )

    def _servers(self) -> int:
        return self.world_size // engine_tp(self.config)

    def _server(self, prompts: int, group_size: int) -> Server:
        config, shape, tp = self.config, self.shape, engine_tp(self.config)
        value = VALUE_BYTES[config.precision.policy.dtype]
        at_once = groups_at_once(config, prompts, self._servers()) * group_size
        if config.rollout.engine == "local":
            at_once = config.rollout.batch_size
        per_token = cache_bytes_per_token(config, shape)
        room = self.cache_bytes // per_token
        return Server(
            weight_bytes=weight_bytes(config, shape),
            cache_bytes=per_token,
            flops=2 * linear_values(shape) * shape.num_layers / tp,
            head_flops=2 * shape.hidden_size * shape.padded_vocab_size / tp,
            attention_flops=4 * shape.num_heads * shape.head_dim * shape.num_layers / tp,
            # An all-reduce sends all but a rank's own share twice.
            reduced_bytes=2 * shape.num_layers * 2 * value * shape.hidden_size * (tp - 1) / tp,
            collectives=2 * shape.num_layers if tp > 1 else 0,
            kind="fp8" if config.rollout.fp8_weights else config.precision.policy.dtype,
            cache_tokens=_rounded(min(room, at_once * longest_sequence(config))),
            sequences=at_once,
        )


def groups_at_once(config: RunConfig, prompts: int, servers: int) -> int:
    """Prompts that one server works on at once; as rollout/sglang_engine.py deals them."""
    share = ceil(prompts / servers)
    most = share if servers == 1 else ceil(share * 3 / 4)
    return min(config.rollout.groups_in_flight, most)


def rounds_of(config: RunConfig, sampled_per_kept: float) -> tuple[int, int]:
    """Generation rounds, and prompts that the last of them must answer."""
    knobs = config.rollout
    per_round = knobs.prompts_per_round or knobs.prompts_per_step
    needed = ceil(sampled_per_kept * knobs.prompts_per_step)
    rounds = ceil(needed / per_round)
    if rounds > knobs.max_rounds:
        raise ConfigError(
            f"rollout.max_rounds: found {knobs.max_rounds}, wanted {rounds} or more: "
            f"{sampled_per_kept:g} prompts for each one that passes are {needed}, and a round "
            f"draws {per_round}; or raise rollout.prompts_per_round"
        )
    return rounds, needed - (rounds - 1) * per_round


def _rounded(tokens: int) -> int:
    """Down by a tenth at most, so that layouts with about the same cache share a simulation."""
    return int(2 ** (int(log2(tokens) * 8) / 8))


@lru_cache(maxsize=4096)
def _round(
    server: Server,
    servers: int,
    prompts: int,
    group_size: int,
    number: int,
    expected: Expectations,
    most: int,
    rates: Rates,
) -> Generation:
    """Lengths go on where those of the round before ended."""
    count = prompts * group_size
    lengths = response_lengths(count * (number + 1), expected.mean_response, expected.spread, most)[
        count * number :
    ]
    groups = [lengths[i : i + group_size] for i in range(0, count, group_size)]
    return generate(groups, expected.mean_prompt, server, servers, rates)
