"""Knobs of a critic that a run does not have are refused, with the knob and the reason."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prime import algorithm_rules, critic_rules
from megatron_prime.config import RunConfig


def config(**tables: dict[str, Any]) -> RunConfig:
    must = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
    return RunConfig.model_validate({**must, **tables})


def found(**tables: dict[str, Any]) -> list[str]:
    whole = config(**tables)
    return [*critic_rules.problems(whole), *algorithm_rules.problems(whole)]


@pytest.mark.parametrize("process_weight", [0.0, 1.0])
@pytest.mark.parametrize("granularity", ["token", "step", "response"])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_gae_goes_with_all_of_these(process_weight: float, granularity: str, gamma: float) -> None:
    advantage = {"estimator": "gae", "gamma": gamma, "gae_lambda": 0.95}
    advantage["process_weight"] = process_weight
    if process_weight:
        advantage["granularity"] = granularity
    critic = {"lr": 1e-3, "value_clip": None, "hf": "elsewhere"}
    assert found(advantage=advantage, critic=critic) == []


def test_gae_needs_no_groups() -> None:
    window = {"min_accuracy": 0.0, "max_accuracy": 1.0}
    assert found(advantage={"estimator": "gae"}, rollout={"group_size": 1}, filter=window) == []


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce", "prime_value"])
@pytest.mark.parametrize(
    ("knob", "tables"),
    [
        ("advantage.gae_lambda: found 0.9", {"advantage": {"gae_lambda": 0.9}}),
        ("critic.lr: found 0.001", {"critic": {"lr": 1e-3}}),
        ("critic.hf: found elsewhere", {"critic": {"hf": "elsewhere"}}),
        ("critic.value_clip: found None", {"critic": {"value_clip": None}}),
        ("precision.critic.dtype: found fp32", {"precision": {"critic": {"dtype": "fp32"}}}),
    ],
)
def test_a_critic_is_of_gae_alone(estimator: str, knob: str, tables: dict[str, Any]) -> None:
    advantage = {"estimator": estimator, **tables.get("advantage", {})}
    (line,) = found(**{**tables, "advantage": advantage})
    assert line.startswith(f'{knob}, but advantage.estimator = "{estimator}" has no critic')


def test_a_resolved_config_of_another_run_says_nothing_new() -> None:
    """It names every knob, as a run folder's does."""
    whole = config().model_dump()
    assert list(critic_rules.problems(RunConfig.model_validate(whole))) == []


def test_the_models_of_a_run() -> None:
    assert config(advantage={"estimator": "gae"}).models == ("policy", "prm", "reference", "critic")
    alone = {"estimator": "gae", "process_weight": 0.0}
    assert config(advantage=alone).models == ("policy", "critic")
    assert "critic" not in config().models
    assert config(advantage=alone).frozen == frozenset()


def test_where_a_model_starts_from() -> None:
    whole = config(critic={"hf": "value"}, prm={"hf": "prm"})
    found = {name: str(whole.hf_of(name)) for name in ("policy", "prm", "reference", "critic")}
    assert found == {"policy": "m", "prm": "prm", "reference": "m", "critic": "value"}
    assert {str(config().hf_of(name)) for name in found} == {"m"}
