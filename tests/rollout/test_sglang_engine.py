"""The engine of one rank on a fake server that does its work, or does not."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time

import pytest
import torch.distributed as dist
from fake_engine import PROMPTS, SAMPLING, STOP, Setting, asked, check_groups, children, truth
from fake_sglang import asked as asked_samples

from megatron_prime.rollout import generation
from megatron_prime.rollout.generation import WrongVersion
from megatron_prime.rollout.sglang_answers import LogprobNotFinite
from megatron_prime.rollout.sglang_engine import TooManyRestarts
from megatron_prime.types import VersionSpan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]
UNTROUBLED = {
    "rollout/server_restarts": 0,
    "rollout/repeated_syncs": 0,
    "rollout/continued_tokens": 0,
}
ONCE = {prompt.prompt_id: 1 for prompt in PROMPTS}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make(tmp_path):
    """`make(knobs, **faults)`: an engine with its setting; nothing of it is left afterwards."""
    made, before = [], children()

    def build(knobs=None, **faults):
        setting = Setting(tmp_path, **(knobs or {}))
        engine = setting.engine(dist.HashStore(), **faults)
        made.append(engine)
        return setting, engine

    yield build
    for engine in made:
        engine.close()
        engine.close()
    assert children() <= before, "processes are left"


def pid_of(engine) -> int:
    return engine._group._server.pid


class Enough:
    """A tally that is reached when the test says so."""

    def __init__(self) -> None:
        self.is_reached = False

    def add(self, group) -> None: ...

    def reached(self) -> bool:
        return self.is_reached


def test_every_prompt_is_answered_once_with_the_weights_of_the_version(make) -> None:
    setting, engine = make({"groups_in_flight": 2})
    setting.load(engine, 1)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(1), 1)
    setting.load(engine, 2)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(2), 2)
    assert asked(setting.server_folder(0)) == {number: 2 for number in ONCE}
    assert engine.take_metrics() == UNTROUBLED


def test_no_two_samples_share_their_random_numbers(make) -> None:
    setting, engine = make()
    setting.load(engine, 1)
    found = list(engine.generate(PROMPTS, SAMPLING))
    other = dataclasses.replace(SAMPLING, seed=6)
    found += list(engine.generate(PROMPTS, other))
    responses = {r.response_ids for group in found for r in group.rollouts}
    assert len(responses) == 2 * 3 * len(PROMPTS)


def test_greedy_answers(make) -> None:
    setting, engine = make()
    setting.load(engine, 1)
    greedy = dataclasses.replace(SAMPLING, samples=1, temperature=0.0)
    for group in engine.generate(PROMPTS, greedy):
        (rollout,) = group.rollouts
        assert rollout.response_ids == truth(setting.digest(1), group.prompt, 0, greedy)


def test_without_weights_nothing_is_sampled(make) -> None:
    _, engine = make()
    with pytest.raises(RuntimeError, match="call load_weights first"):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("fault", ["die_after", "stop_after"])
def test_a_server_that_fails_while_it_generates_is_made_anew(make, fault) -> None:
    setting, engine = make({"groups_in_flight": 2}, **{fault: 5}, starts=1, token_s=0.005)
    setting.load(engine, 1)
    first = pid_of(engine)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(1), 1)
    assert pid_of(engine) != first
    times = asked(setting.server_folder(0))
    assert times.keys() == ONCE.keys()
    again = sum(times.values()) - len(PROMPTS)
    assert 1 <= again <= 2, "what was in flight, and nothing else"
    assert max(times.values()) == 2
    assert engine.take_metrics() == UNTROUBLED | {"rollout/server_restarts": 1}
    assert engine.take_metrics() == UNTROUBLED


def test_a_request_that_takes_too_long_ends_the_server(make) -> None:
    knobs = {"request_timeout_s": 3.0, "hang_timeout_s": 60.0}
    setting, engine = make(knobs, token_s=100, starts=1)
    setting.load(engine, 1)
    check_groups(list(engine.generate(PROMPTS[:2], SAMPLING)), setting.digest(1), 1, PROMPTS[:2])
    assert engine.take_metrics()["rollout/server_restarts"] == 1


def test_a_busy_server_is_not_taken_for_a_hung_one(make) -> None:
    setting, engine = make({"hang_timeout_s": 3.0}, token_s=0.5)
    setting.load(engine, 1)
    long = dataclasses.replace(SAMPLING, max_tokens=9)
    started = time.monotonic()
    (group,) = engine.generate(PROMPTS[:1], long)
    assert time.monotonic() - started > 4
    assert [r.response_ids for r in group.rollouts] == [
        truth(setting.digest(1), PROMPTS[0], k, long) for k in range(3)
    ]
    assert engine.take_metrics() == UNTROUBLED


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_fails_between_steps_is_made_anew(make, how) -> None:
    setting, engine = make({"sync_timeout_s": 3.0})
    setting.load(engine, 1)
    os.kill(pid_of(engine), how)
    setting.load(engine, 2)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(2), 2)
    restarted = {"rollout/server_restarts": 1, "rollout/repeated_syncs": 1}
    assert engine.take_metrics() == UNTROUBLED | restarted


def test_a_server_that_dies_before_it_is_asked_anything_is_made_anew(make) -> None:
    setting, engine = make()
    setting.load(engine, 1)
    os.kill(pid_of(engine), signal.SIGKILL)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(1), 1)
    assert asked(setting.server_folder(0)) == ONCE


def test_a_server_that_dies_in_a_sync_is_made_anew(make) -> None:
    setting, engine = make(die_in_update=2, starts=1)
    setting.load(engine, 1)
    setting.load(engine, 2)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(2), 2)
    restarted = {"rollout/server_restarts": 1, "rollout/repeated_syncs": 1}
    assert engine.take_metrics() == UNTROUBLED | restarted


def test_weights_that_arrived_wrong_are_sent_again(make, capfd) -> None:
    setting, engine = make(corrupt=2)
    setting.load(engine, 1)
    first = pid_of(engine)
    setting.load(engine, 2)
    assert pid_of(engine) == first
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(2), 2)
    assert engine.take_metrics() == UNTROUBLED | {"rollout/repeated_syncs": 1}
    told = capfd.readouterr().out
    assert re.search(r"checksums of sent and loaded weights differ: model\.\S+\n", told), told


def test_too_many_restarts_end_the_run_with_the_log(make) -> None:
    setting, engine = make({"max_restarts": 2}, die_after=1)
    setting.load(engine, 1)
    with pytest.raises(TooManyRestarts) as caught:
        list(engine.generate(PROMPTS, SAMPLING))
    assert "failed 3 times in one step, more than rollout.max_restarts = 2" in str(caught.value)
    assert "server.log ends with\n" in str(caught.value)
    assert sum(asked(setting.server_folder(0)).values()) == 3, "each process died at its first"


def test_restarts_are_counted_anew_in_each_step(make) -> None:
    setting, engine = make({"max_restarts": 1})
    for version in (1, 2, 3):
        setting.load(engine, version)
        os.kill(pid_of(engine), signal.SIGKILL)
        check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(version), version)
        assert engine.take_metrics()["rollout/server_restarts"] == 1


@pytest.mark.parametrize(("how", "error"), [("version", WrongVersion), ("nan", LogprobNotFinite)])
def test_an_answer_that_cannot_be_trusted_stops_the_run(make, how, error) -> None:
    setting, engine = make(spoil=[None, how])
    setting.load(engine, 1)
    with pytest.raises(error, match=r"request 1-1-\d+-0"):
        list(engine.generate(PROMPTS, SAMPLING))
    assert engine.take_metrics() == UNTROUBLED


def test_groups_come_out_while_others_are_sampled(make) -> None:
    setting, engine = make({"groups_in_flight": 1}, token_s=0.05)
    setting.load(engine, 1)
    groups = engine.generate(PROMPTS[:4], SAMPLING)
    next(groups)
    assert len(asked(setting.server_folder(0))) < 4
    list(groups)


def aborted_after(engine, count, prompts=PROMPTS, sampling=SAMPLING):
    """What comes out of a round that has enough when `count` groups are there."""
    enough, found = Enough(), []
    for group in engine.generate(prompts, sampling, enough):
        found.append(group)
        enough.is_reached = len(found) >= count
    return found


LONG = dataclasses.replace(SAMPLING, max_tokens=400)


def test_enough_ends_the_round(make) -> None:
    setting, engine = make({"groups_in_flight": 3}, token_s=0.005)
    setting.load(engine, 1)
    prompts = [p for p in PROMPTS if not any(ends_early(setting, p, k) for k in range(3))]
    enough = Enough()
    enough.is_reached = True
    assert list(engine.generate(prompts, LONG, enough)) == []
    found = list(engine.generate(PROMPTS, SAMPLING, Enough()))
    check_groups(found, setting.digest(1), 1)
    assert engine.take_metrics() == UNTROUBLED


def ends_early(setting, prompt, sample) -> bool:
    return truth(setting.digest(1), prompt, sample, LONG)[-1] == STOP


def test_a_round_that_is_ended_has_no_group_twice(make) -> None:
    setting, engine = make({"groups_in_flight": 2}, token_s=0.01)
    setting.load(engine, 1)
    first = aborted_after(engine, 3)
    assert 3 <= len(first) < len(PROMPTS)
    answered = {group.prompt.prompt_id for group in first}
    rest = [prompt for prompt in PROMPTS if prompt.prompt_id not in answered]
    second = list(engine.generate(rest, SAMPLING))
    check_groups(first + second, setting.digest(1), 1)  # from the start: nothing was kept
    assert engine.take_metrics() == UNTROUBLED


def test_what_was_begun_is_continued_with_the_new_weights(make) -> None:
    setting, engine = make({"keep_partial": True, "abort_surplus": True}, token_s=0.1)
    begun = cut_round(setting, engine)
    setting.load(engine, 2)
    greedy = dataclasses.replace(SAMPLING, samples=1, temperature=0.0)
    assert len(list(engine.generate(PROMPTS, greedy))) == len(PROMPTS)  # an evaluation
    assert engine.take_metrics() == UNTROUBLED
    continued = 0
    found = list(engine.generate(PROMPTS, SAMPLING, Enough()))
    assert sorted(g.prompt.prompt_id for g in found) == sorted(ONCE)
    for group in found:
        for k, rollout in enumerate(group.rollouts):
            old = begun[group.prompt.prompt_id, k]
            assert rollout.response_ids[: len(old)] == old
            whole = truth(setting.digest(2), group.prompt, k, begun=old)
            assert rollout.response_ids == whole
            assert len(rollout.rollout_logprobs) == len(whole)
            if len(whole) > len(old) > 0:
                assert rollout.versions == (
                    VersionSpan(len(old), 1),
                    VersionSpan(len(whole) - len(old), 2),
                )
                continued += len(old)
            else:
                version = 1 if old else 2
                assert rollout.versions == (VersionSpan(len(whole), version),)
    assert continued > 0
    assert engine.take_metrics() == UNTROUBLED | {"rollout/continued_tokens": continued}


def cut_round(setting, engine) -> dict[tuple[int, int], tuple[int, ...]]:
    """Abort a round in the middle; the tokens that are kept, held against the truth."""
    setting.load(engine, 1)
    enough = Enough()
    groups = engine.generate(PROMPTS, SAMPLING, enough)
    enough.is_reached = True  # seen by the watch after a moment
    assert list(groups) == []
    begun = {
        (number, k): partial.token_ids
        for number, partials in engine._partials.items()
        for k, partial in enumerate(partials)
    }
    assert begun.keys() == {(p.prompt_id, k) for p in PROMPTS for k in range(3)}
    lengths = [len(tokens) for tokens in begun.values()]
    assert 0 < sum(lengths) < 3 * SAMPLING.max_tokens * len(PROMPTS)
    for prompt in PROMPTS:
        for k in range(3):
            tokens = begun[prompt.prompt_id, k]
            assert truth(setting.digest(1), prompt, k)[: len(tokens)] == tokens
    return begun


def test_what_was_begun_outlives_the_server(make) -> None:
    setting, engine = make({"keep_partial": True, "abort_surplus": True}, token_s=0.1)
    begun = cut_round(setting, engine)
    os.kill(pid_of(engine), signal.SIGKILL)
    found = list(engine.generate(PROMPTS, SAMPLING, Enough()))
    check_groups(found, setting.digest(1), 1)  # one version: as if nothing had been
    assert sum(map(len, begun.values())) > 0


def test_a_round_that_is_ended_asks_for_no_more_prompts(make) -> None:
    setting, engine = make({"groups_in_flight": 1}, token_s=0.02)
    setting.load(engine, 1)
    found = aborted_after(engine, 1)
    numbers = {line["rid"].split("-")[2] for line in asked_samples(setting.server_folder(0))}
    assert len(found) <= len(numbers) <= len(found) + 1


def test_seeds_differ_between_prompts_samples_and_rounds() -> None:
    seeds = {
        generation.sampling_seed(seed, prompt, sample)
        for seed in range(10)
        for prompt in range(30)
        for sample in range(8)
    }
    assert len(seeds) == 2400
    assert all(0 <= seed < 1 << 63 for seed in seeds)
