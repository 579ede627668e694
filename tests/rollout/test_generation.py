"""A pass over a client that does as it is told; whole servers are in test_sglang_engine.py."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_prime.rollout.generation import (
    Limits,
    Pass,
    PassRunner,
    in_flight,
    sampling_seed,
)
from megatron_prime.rollout.sglang_answers import Sample, SampleRequest
from megatron_prime.rollout.sglang_client import ServerSlow
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Group, Prompt, Sampling

PROMPTS = [Prompt(i, (5, 6 + i), "", "math", "test") for i in range(7)]
SAMPLING = Sampling(samples=2, temperature=1.0, max_tokens=4, seed=3)
STOP = 1


class Client:
    """Stands for SglangClient."""

    def __init__(self, slow: Sequence[int] = (), healthy: bool = True) -> None:
        """`slow`: which calls, counted from 0, take too long."""
        self.slow, self.well = set(slow), healthy
        self.calls: list[tuple[str, float]] = []
        self.now = self.most = 0
        self.drained_after: list[int] = []  # calls that were done

    async def generate(
        self, requests: Sequence[SampleRequest], temperature: float, stops: object, timeout_s: float
    ) -> list[Sample]:
        number = len(self.calls)
        self.calls.append((requests[0].rid, timeout_s))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        if number in self.slow:
            raise ServerSlow("no answer within 5 s")
        return [Sample(r.rid, (9, STOP), (-0.5, -0.1), "stop", "4", 0) for r in requests]

    async def healthy(self, timeout_s: float, sampling: bool = True) -> bool:
        return self.well

    async def drained(self, patience_s: float) -> None:
        self.drained_after.append(len(self.calls))

    async def abort(self, rid: str | None = None) -> None:
        raise AssertionError("nothing is to be aborted")


def run(
    client: Client, in_flight: int = 3, sampling: Sampling = SAMPLING
) -> tuple[Pass, list[Group]]:
    limits = Limits(in_flight, request_s=5.0, hang_s=400.0, keep_partial=False)
    runner = PassRunner(client, lambda: True, limits, [STOP], 4, "p", str, Timeline())  # type: ignore[arg-type]
    groups: list[Group] = []
    counter = itertools.count()
    take = lambda: next(counter)  # noqa: E731
    return asyncio.run(runner.run(PROMPTS, sampling, {}, take, groups.append, None)), groups


def test_every_prompt_is_answered_once_with_a_bounded_number_in_flight() -> None:
    client = Client()
    found, groups = run(client)
    assert found.problem is None
    assert sorted(found.answered) == [p.prompt_id for p in PROMPTS]
    assert sorted(g.prompt.prompt_id for g in groups) == sorted(found.answered)
    assert client.most == 3


def test_a_greedy_pass_ends_when_the_server_has_let_go_of_its_requests() -> None:
    client = Client()
    run(client)
    assert client.drained_after == []
    run(client, sampling=replace(SAMPLING, samples=1, temperature=0.0))
    assert client.drained_after == [2 * len(PROMPTS)]


def test_a_slow_prompt_on_a_healthy_server_is_asked_once_more_with_twice_the_time() -> None:
    client = Client(slow=[1])
    found, groups = run(client)
    assert found.problem is None
    assert len(groups) == len(PROMPTS)
    slow_rid, _ = client.calls[1]
    assert client.calls.count((f"{slow_rid}-again", 10.0)) == 1
    assert len(client.calls) == len(PROMPTS) + 1


@pytest.mark.parametrize(
    "client", [Client(slow=[0], healthy=False), Client(slow=range(99))], ids=["hung", "slow twice"]
)
def test_a_server_that_stays_slow_ends_the_pass(client: Client) -> None:
    found, groups = run(client, in_flight=1)
    assert found.problem == "no answer within 5 s"
    assert (found.answered, groups) == ([], [])
    assert len(client.calls) == (1 if not client.well else 2)


def test_prompts_that_nobody_follows_leave_slots_empty() -> None:
    """Two slots, three prompts of 0.4, 1.2 and 0.4 s: one slot has nothing to do for 0.4 s."""

    class Slow(Client):
        async def generate(self, requests: Sequence[SampleRequest], *args: object) -> list[Sample]:
            await asyncio.sleep({0: 0.4, 1: 1.2, 2: 0.4}[requests[0].input_ids[1] - 6])
            return await super().generate(requests, *args)  # type: ignore[arg-type]

    timeline = Timeline()
    limits = Limits(2, request_s=5.0, hang_s=400.0, keep_partial=False)
    runner = PassRunner(
        Slow(),  # type: ignore[arg-type]
        *(lambda: True, limits, [STOP], 4, "p", str, timeline),
    )
    counter = itertools.count()
    run = runner.run(PROMPTS[:3], SAMPLING, {}, lambda: next(counter), lambda group: None, None)
    asyncio.run(run)
    seconds = timeline.met()
    assert seconds is not None
    assert seconds.long_tail == pytest.approx(0.4 / 2, abs=0.08)
    assert seconds.busy == pytest.approx(1.2 - 0.4 / 2, abs=0.15)
    assert seconds.verifying == 0


def test_seeds_belong_to_the_response() -> None:
    seeds = {sampling_seed(s, p, k) for s in range(20) for p in range(20) for k in range(4)}
    assert len(seeds) == 20 * 20 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(3, 5, 1) == sampling_seed(3, 5, 1)


@pytest.mark.parametrize(
    ("prompts", "servers", "most", "wanted"),
    [(100, 1, 256, 100), (100, 1, 30, 30), (100, 4, 256, 19), (100, 4, 10, 10), (1, 8, 256, 1)],
)
def test_no_server_takes_its_whole_share_at_once(prompts, servers, most, wanted) -> None:
    assert in_flight(prompts, servers, most) == wanted
