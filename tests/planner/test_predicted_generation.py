"""What a run's servers are like, and its rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planned_runs import run_config

from megatron_prime.config import ConfigError
from megatron_prime.planner.generation import Rollouts, groups_at_once, rounds_of
from megatron_prime.planner.lengths import Expectations, response_lengths
from megatron_prime.planner.rates import GPUS
from megatron_prime.weights.shape import ModelShape


def rollouts(folder: Path, world_size: int = 8, **rollout: Any) -> Rollouts:
    config = run_config(folder, "Llama-3-8B", rollout={"engine": "sglang", **rollout})
    shape = ModelShape.from_hf(config.model.hf)
    return Rollouts(config, shape, world_size, 2**35, GPUS["h100"], Expectations.of(config))


@pytest.mark.parametrize(("prompts", "servers"), [(256, 1), (256, 16), (100, 3), (5000, 2)])
def test_servers_work_on_as_many_prompts_as_the_engine_deals(
    prompts: int, servers: int, tmp_path: Path
) -> None:
    from megatron_prime.rollout.sglang_engine import in_flight

    config = run_config(tmp_path)
    dealt = in_flight(prompts, servers, config.rollout.groups_in_flight)
    assert groups_at_once(config, prompts, servers) == dealt


def test_rounds(tmp_path: Path) -> None:
    config = run_config(tmp_path, rollout={"prompts_per_step": 100, "prompts_per_round": 60})
    assert rounds_of(config, 1) == (2, 40)
    assert rounds_of(config, 1.2) == (2, 60)
    assert rounds_of(config, 4) == (7, 40)
    with pytest.raises(ConfigError, match=r"max_rounds: found 8, wanted 9 .* 500, .* draws 60"):
        rounds_of(config, 5)


def test_two_rounds_take_twice_as_long_and_an_aborted_one_less(tmp_path: Path) -> None:
    both = rollouts(tmp_path)
    total = sum(both.of_step().values())
    one = both.round(256, 4).seconds
    assert total == pytest.approx(2 * one, rel=0.05)
    some = {"prompts_per_round": 384, "abort_surplus": True}
    stopped = sum(rollouts(tmp_path, **some).of_step().values())
    waited = sum(rollouts(tmp_path, prompts_per_round=384).of_step().values())
    assert stopped == pytest.approx(waited)  # a round of as many as are needed waits for all
    few = Expectations.of(both.config, sampled_per_kept=1.1)
    knobs = both.config.rollout.model_copy(update=some)
    config = both.config.model_copy(update={"rollout": knobs})
    early = Rollouts(config, both.shape, 8, 2**35, GPUS["h100"], few)
    assert sum(early.of_step().values()) < 0.8 * waited


def test_what_is_trained_on_is_shorter_where_the_longest_are_aborted(tmp_path: Path) -> None:
    plain = rollouts(tmp_path, prompts_per_round=512)
    mean = plain.expected.mean_response
    assert sum(plain.trained()) / len(plain.trained()) == pytest.approx(mean, rel=0.05)
    some = rollouts(tmp_path, prompts_per_round=512, abort_surplus=True)
    expected = Expectations.of(some.config, sampled_per_kept=1.25)
    early = replace(some, expected=expected)
    ((one, end),) = early.rounds_of_step()
    answered = early.answered()
    assert len(answered) == 320 == sum(done <= end for done in one.done)
    asked = response_lengths(512 * 4, mean, expected.spread, 3072)
    groups = [asked[i : i + 4] for i in range(0, len(asked), 4)]
    assert answered == [group for group, done in zip(groups, one.done, strict=True) if done <= end]
    kept = early.trained()
    assert len(kept) == 256 * 4
    assert kept[:4] == answered[0]
    assert kept[4 * 255 :] == answered[318]  # 255 × 320 // 256
    assert sum(kept) / len(kept) < 0.95 * mean


def test_a_long_tail_costs_half_as_much_again(tmp_path: Path) -> None:
    """All responses of the mean length are done much earlier than the same number of tokens."""
    mixed = rollouts(tmp_path)
    even = Rollouts(
        mixed.config,
        mixed.shape,
        8,
        2**35,
        GPUS["h100"],
        Expectations.of(mixed.config, spread=0.01),
    )
    assert mixed.round(256, 4).seconds > 1.5 * even.round(256, 4).seconds


def test_a_small_cache_makes_prompts_wait(tmp_path: Path) -> None:
    """128 sequences of 1300 tokens of 128 KiB are 20 GiB."""
    roomy = rollouts(tmp_path)
    cramped = Rollouts(
        roomy.config, roomy.shape, 8, 2**32, GPUS["h100"], Expectations.of(roomy.config)
    )
    assert cramped.round(256, 4).seconds > 1.5 * roomy.round(256, 4).seconds


def test_servers_over_more_ranks_read_faster_and_exchange(tmp_path: Path) -> None:
    one, eight = rollouts(tmp_path), rollouts(tmp_path, tensor_parallel_size=8)
    assert set(one.round(256, 4).by) == {"compute", "nvlink", "hbm"}
    assert eight.round(256, 4).by["latency"] > 0
    longest = 3072 * 64 * 10e-6  # passes, all-reduces of a pass, seconds
    assert eight.round(256, 4).by["latency"] == pytest.approx(longest, rel=0.05)
