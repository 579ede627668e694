"""Drawn lengths have the mean that was asked for, cut ones included."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import pytest
from planned_runs import run_config

from megatron_prime.config import ConfigError
from megatron_prime.planner.lengths import Expectations, response_lengths


@pytest.mark.parametrize(("wanted", "most"), [(1000, 3072), (2500, 3072), (300, 8192)])
def test_the_mean_is_that_of_cut_lengths(wanted: float, most: int) -> None:
    count = 20_000
    found = response_lengths(count, wanted, 0.6, most)
    assert abs(mean(found) - wanted) < 4 * stdev(found) / count**0.5
    assert max(found) <= most
    assert min(found) >= 1
    assert (most in found) is (wanted > most / 4)


def test_more_lengths_begin_with_the_same() -> None:
    assert response_lengths(20, 100, 0.6, 500)[:10] == response_lengths(10, 100, 0.6, 500)
    assert response_lengths(3, 500, 0.6, 500) == (500, 500, 500)


def test_defaults(tmp_path: Path) -> None:
    found = Expectations.of(run_config(tmp_path))
    assert (found.mean_prompt, found.mean_response, found.sampled_per_kept) == (256, 1024, 2)
    rollout = {"prompts_per_step": 100, "prompts_per_round": 150}
    assert Expectations.of(run_config(tmp_path, rollout=rollout)).sampled_per_kept == 1.5


@pytest.mark.parametrize("option", ["mean_prompt", "mean_response", "sampled_per_kept", "spread"])
def test_impossible_expectations_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}: found 0, wanted"):
        Expectations.of(run_config(tmp_path), **{option: 0})
