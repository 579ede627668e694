"""The long tail by hand on one round, and its ways on the servers of a real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planned_runs import SGLANG_8B, run_config

from megatron_prime.planner.decoding import Server, generate
from megatron_prime.planner.generation import Rollouts
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.rates import GPUS, Rates
from megatron_prime.planner.tail import SPREADS, tails
from megatron_prime.weights.shape import ModelShape


def test_when_servers_have_nothing_left_to_do() -> None:
    """One token is 10 ms; two servers take one prompt at a time, of 3, 1 and 1 tokens."""
    server = Server(10e6, 0, 0, 0, 0, 0, 0, "bf16", 10**6, 1)
    rates = Rates(80, 1000, 1000, 1000, 1, 1, 1, 1, hbm_share=1)
    found = generate([[3], [1], [1]], 0, server, 2, rates)
    assert found.finished == pytest.approx((0.03, 0.02))
    assert found.done == pytest.approx((0.03, 0.01, 0.02))


def test_ways_and_spreads(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        "Llama-3-8B",
        **{**SGLANG_8B, "rollout": {**SGLANG_8B["rollout"], "prompts_per_step": 128}},
    )
    expected = Expectations.of(config, mean_response=900)
    shape = ModelShape.from_hf(config.model.hf)
    rollouts = Rollouts(config, shape, 16, 2**35, GPUS["h100"], expected)
    found = {(one.spread, one.way): one for one in tails(rollouts)}
    assert len(found) == 3 * len(SPREADS)
    for spread in SPREADS:
        rounds, at_once, surplus = (found[spread, way] for way in ("rounds", "at once", "surplus"))
        asked = [one.prompts_per_round for one in (rounds, at_once, surplus)]
        assert asked == [128, 256, 320]
        assert rounds.mean_response == at_once.mean_response == pytest.approx(900, rel=0.05)
        assert surplus.mean_response < 0.99 * at_once.mean_response
        assert surplus.seconds < at_once.seconds < rounds.seconds
        assert surplus.half < 1
        assert surplus.idle <= at_once.idle < rounds.idle
    assert found[0.6, "rounds"].seconds == pytest.approx(sum(rollouts.of_step().values()))


def test_half_of_what_was_answered_is_not_half_of_what_was_asked(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        "Llama-3-8B",
        **{**SGLANG_8B, "rollout": {**SGLANG_8B["rollout"], "prompts_per_step": 128}},
    )
    shape = ModelShape.from_hf(config.model.hf)
    rollouts = Rollouts(config, shape, 16, 2**35, GPUS["h100"], Expectations.of(config))
    found = next(one for one in tails(rollouts) if one.way == "surplus")
    expected = replace(rollouts.expected, spread=found.spread)
    knobs = config.rollout.model_copy(update={"prompts_per_round": 320, "abort_surplus": True})
    asked = config.model_copy(update={"rollout": knobs})
    ((one, end),) = replace(rollouts, config=asked, expected=expected).rounds_of_step()
    done = sorted(one.done)
    assert (found.seconds, end) == (done[255], done[255])
    assert found.half == done[127] / done[255]
