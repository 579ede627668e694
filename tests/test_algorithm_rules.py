"""Choices of the algorithm that contradict each other are refused, with the knob and the reason."""

from __future__ import annotations

import pytest

from megatron_prime.algorithm_rules import problems
from megatron_prime.config import RunConfig


def found(**tables):
    base = {"run": {"folder": "run"}, "model": {"hf": "model"}, "data": {"train": "train.jsonl"}}
    return list(problems(RunConfig.model_validate(base | tables)))


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
def test_estimators_go_with_and_without_process_rewards(estimator, weight):
    assert found(advantage={"estimator": estimator, "process_weight": weight}) == []


@pytest.mark.parametrize("preset", ["released", "paper"])
@pytest.mark.parametrize("granularity", ["token", "step"])
def test_prime_as_value_model_goes_with_both_presets(preset, granularity):
    advantage = {"estimator": "prime_value", "granularity": granularity}
    assert found(preset=preset, advantage=advantage) == []


@pytest.mark.parametrize(
    ("tables", "start"),
    [
        (
            {"advantage": {"process_weight": 0.0, "outcome_weight": 0.0}},
            "advantage.process_weight, advantage.outcome_weight: found 0 for both",
        ),
        (
            {"advantage": {"group_std": False}},
            'advantage.group_std: found false with advantage.estimator = "rloo"',
        ),
        (
            {"advantage": {"estimator": "prime_value", "process_weight": 0.0}},
            "advantage.process_weight, advantage.outcome_weight: found a 0 with",
        ),
        (
            {"advantage": {"estimator": "prime_value", "outcome_weight": 0.0}},
            "advantage.process_weight, advantage.outcome_weight: found a 0 with",
        ),
        (
            {"advantage": {"estimator": "prime_value", "gamma": 0.9}},
            'advantage.gamma: found 0.9 with advantage.estimator = "prime_value", wanted 1',
        ),
        (
            {"advantage": {"granularity": "step", "process_weight": 0.0}},
            'advantage.granularity: found "step" with advantage.process_weight = 0',
        ),
        (
            {"advantage": {"estimator": "prime_value", "granularity": "response"}},
            'advantage.granularity: found "response" with advantage.estimator = "prime_value"',
        ),
        (
            {"policy": {"loss": {"dual_clip": 1.2}}},
            "policy.loss.dual_clip: found 1.2, wanted more than 1 + 0.2 = 1.2",
        ),
        (
            {"policy": {"loss": {"dual_clip": 1.25, "clip_high": 0.28}}},
            "policy.loss.dual_clip: found 1.25, wanted more than 1 + 0.28 = 1.28",
        ),
        (
            {"policy": {"loss": {"kl_coefficient": 0.1}}, "rollout": {"temperature": 0.7}},
            "policy.loss.kl_coefficient: found 0.1 with rollout.temperature = 0.7",
        ),
        (
            {"policy": {"loss": {"kl_coefficient": 0.1}}, "prm": {"reference": "policy"}},
            'policy.loss.kl_coefficient: found 0.1 with prm.reference = "policy"',
        ),
        (
            {"filter": {"min_accuracy": 0.9}},
            "filter.min_accuracy: found 0.9, above filter.max_accuracy = 0.8",
        ),
    ],
)
def test_what_means_nothing_is_refused(tables, start):
    (problem,) = found(**tables)
    assert problem.startswith(start)


def test_a_tie_to_the_reference_needs_no_prm():
    tables = {"policy": {"loss": {"kl_coefficient": 0.1}}, "advantage": {"process_weight": 0.0}}
    assert found(**tables) == []
    base = {"run": {"folder": "run"}, "model": {"hf": "model"}, "data": {"train": "train.jsonl"}}
    tied = RunConfig.model_validate(base | tables)
    assert tied.models == ("policy", "reference")
    assert tied.batches_of("reference") is tied.policy
    assert RunConfig.model_validate(base).batches_of("reference") == tied.prm
    assert tied.frozen == {"reference"}


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_a_comparison_needs_others(estimator):
    everyone = {"min_accuracy": 0.0, "max_accuracy": 1.0}
    (problem,) = found(
        advantage={"estimator": estimator}, rollout={"group_size": 1}, filter=everyone
    )
    assert problem.startswith("rollout.group_size: found 1, wanted 2 or more: advantage.estimator")
    assert f'"{estimator}"' in problem


@pytest.mark.parametrize("estimator", ["reinforce", "prime_value"])
def test_one_response_to_a_prompt_needs_a_window_that_is_open(estimator):
    run = {"advantage": {"estimator": estimator}, "rollout": {"group_size": 1}}
    (problem,) = found(**run)
    assert problem.startswith("filter.min_accuracy, filter.max_accuracy: found [0.2, 0.8] with")
    assert found(**run, filter={"min_accuracy": 0.0, "max_accuracy": 1.0}) == []


def test_one_response_has_no_variance():
    (problem,) = found(
        advantage={"estimator": "reinforce"},
        rollout={"group_size": 1},
        filter={"min_accuracy": 0.0, "max_accuracy": 1.0, "zero_variance": "drop"},
    )
    assert problem.startswith('filter.zero_variance: found "drop" with rollout.group_size = 1')
