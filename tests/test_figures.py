"""A step's figures by value, from small hand-made groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_prime import figures
from megatron_prime.config import RunConfig
from megatron_prime.types import (
    OldLogprobs,
    PolicyUpdate,
    Prompt,
    Rollout,
    RolloutBatch,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
)

NAN = float("nan")


def group(
    rewards: list[float], lengths: list[int], cut: int = 0, failures: int = 0, number: int = 0
) -> VerifiedGroup:
    """Responses of `lengths`, the first `cut` of them cut off; engine log-probs are all -1."""
    rollouts = tuple(
        Rollout((5,) * length, (-1.0,) * length, "length" if i < cut else "stop", 0, "")
        for i, length in enumerate(lengths)
    )
    prompt = Prompt(number, (1, 2), "4", "math", "test")
    return VerifiedGroup(prompt, rollouts, tuple(rewards), failures)


def config(**knobs: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}, **knobs}
    )


EASY = group([1, 1, 1, 0], [2, 2, 3, 1])
HARD = group([0, 0, 0, 0], [5, 7, 4, 8], cut=2, failures=3, number=1)
MIDDLING = group([1, 0], [2, 3])
EVEN = group([0.5, 0.5], [1, 2], number=1)


def scored(*groups: VerifiedGroup, ref: float | None = -2.0) -> ScoredBatch:
    rollouts = RolloutBatch.from_groups(groups)
    shape = rollouts.response_mask.shape
    return ScoredBatch(
        rollouts,
        OldLogprobs.none(rollouts),
        None if ref is None else torch.full(shape, ref),
    )


def pair_accuracies(
    batch: ScoredBatch, before: torch.Tensor, after: torch.Tensor | None
) -> dict[str, float]:
    found, prefix = figures.of_prm(config().prm, batch, before, after, 0), "prm/pair_accuracy_"
    return {n.removeprefix(prefix): value for n, value in found.items() if n.startswith(prefix)}


def test_generated_and_kept_are_told_apart() -> None:
    assert figures.of_rollouts([EASY, HARD], [EASY], rounds=3) == {
        "rollout/accuracy": 3 / 8,
        "rollout/response_length_mean": 32 / 8,
        "rollout/response_length_max": 8,
        "rollout/tokens": 32,
        "rollout/truncation_rate": 2 / 8,
        "rollout/rounds": 3,
        "rollout/aborted": 0,
        "verify/failures": 3,
        "filter/generated": 2,
        "filter/kept": 1,
        "filter/accuracy": 3 / 4,
    }


def test_an_evaluation_has_an_answer_per_prompt() -> None:
    answers = [group([1], [3]), group([0], [6], cut=1, failures=1, number=1), group([1], [3])]
    assert figures.of_evaluation(answers) == {
        "evaluate/accuracy": pytest.approx(2 / 3),
        "evaluate/response_length_mean": 4,
        "evaluate/response_length_max": 6,
        "evaluate/tokens": 12,
        "evaluate/truncation_rate": pytest.approx(1 / 3),
        "evaluate/failures": 1,
    }


def test_a_benchmarks_accuracy_counts_what_is_wholly_right() -> None:
    answers = [group([1], [3]), group([0.5], [6], cut=1, failures=1, number=1)]
    assert figures.of_set("amc", answers) == {
        "eval/amc/accuracy": 0.5,
        "eval/amc/response_length_mean": 4.5,
        "eval/amc/response_length_max": 6,
        "eval/amc/tokens": 9,
        "eval/amc/truncation_rate": 0.5,
        "eval/amc/failures": 1,
    }


def test_prm_orders_pairs_before_and_after_its_update() -> None:
    """Of the first group's one pair; the second's outcomes are equal and count 0.5."""
    batch = scored(MIDDLING, EVEN)
    wrong = torch.full((4, 3), -2.0)
    right = wrong.clone()
    wrong[1] += 0.1  # the wrong answer of the first group gets the higher sequence reward
    right[0, :2] += 0.1
    assert pair_accuracies(batch, wrong, right) == {"before": 0.25, "after": 0.75}
    assert pair_accuracies(batch, right, None) == {"before": 0.75}


def test_prm_rewards_are_sums_over_the_response_and_padding_counts_nothing() -> None:
    """The right answer has two tokens; what lies in its third column would turn the order."""
    batch = scored(MIDDLING)
    prm = torch.tensor([[-1.0, -2.0, -900.0], [-1.5, -1.8, -1.8]])
    # Sequence rewards 1 + 0 and 0.5 + 0.2 + 0.2 over the reference's -2.
    assert pair_accuracies(batch, prm, None) == {"before": 1.0}
    clean = figures.of_prm(config().prm, batch, prm, None, 0)
    prm[0, 2] = NAN
    assert figures.of_prm(config().prm, batch, prm, None, 0) == clean


def test_the_prms_health_is_of_before_its_update_and_in_betas() -> None:
    """R is 1 of the right answer and 0.9 of the wrong one, times a beta of 2."""
    batch = scored(MIDDLING)
    before = torch.tensor([[-1.0, -2.0, NAN], [-1.5, -1.8, -1.8]])
    found = figures.of_prm(config(prm={"beta": 2.0}).prm, batch, before, before - 3, 5)
    assert found["prm/reward_right_mean"] == pytest.approx(2.0)
    assert found["prm/reward_wrong_mean"] == pytest.approx(1.8)
    chances = [1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-1.8))]
    assert found["prm/predicted_accuracy"] == pytest.approx(sum(chances) / 2)
    assert found["prm/over_optimisation_gap"] == pytest.approx(sum(chances) / 2 - 0.5)
    assert found["prm/length_correlation"] == pytest.approx(-1)
    assert found["prm/last_tokens_share"] == pytest.approx((0 + 0.2) / 1.9)


@pytest.mark.parametrize(
    ("forward", "stale"), [("single", 1), ("single_strict", 1), ("double", 0), ("frozen", 7)]
)
def test_how_long_ago_the_prm_learnt(forward: str, stale: int) -> None:
    knobs, batch, prm = config(prm={"forward": forward}).prm, scored(MIDDLING), torch.zeros(2, 3)
    assert figures.of_prm(knobs, batch, prm, None, 7)["prm/staleness"] == stale
    assert figures.of_prm(knobs, batch, prm, None, 0)["prm/staleness"] == 0


def test_returns_advantages_and_mismatch() -> None:
    """Two responses of two and three tokens, outcomes 1 and 0, gamma 0.5."""
    batch = scored(MIDDLING)
    old = torch.tensor([[-1.0, -0.5, NAN], [-1.0, -1.0, -3.0]])
    process = torch.tensor([[0.2, 0.4, NAN], [-0.8, 0.0, 0.4]])
    advantages = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
    trained = TrainBatch(batch, process, advantages)
    found = figures.of_batch(trained, PolicyUpdate(old, {}), config(advantage={"gamma": 0.5}))
    # Returns-to-go 0.2 + 0.2, 0.4 | -0.8 + 0 + 0.1, 0 + 0.2, 0.4 and outcomes 1, 1 | 0, 0, 0.
    returns = torch.tensor([0.4, 0.4, -0.7, 0.2, 0.4])
    outcomes = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    gaps = [0.0, 0.5, 0.0, 0.0, -2.0]  # trainer less engine
    expected = {
        "prm/process_return_mean": float(returns.mean()),
        "prm/process_return_std": float(returns.std()),
        "prm/process_return_abs_max": 0.7,
        "policy/outcome_return_mean": 0.4,
        "policy/outcome_return_std": float(outcomes.std()),
        "policy/outcome_return_abs_max": 1.0,
        "rollout/mismatch_kl": sum(math.exp(gap) - 1 - gap for gap in gaps) / 5,
        "rollout/mismatch_max": 2.0,
        "rollout/mismatch_alarm": 1.0,  # of 0.05
        "policy/advantage_mean": 3.0,
        "policy/advantage_std": math.sqrt(2.5),
    }
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_without_process_rewards_nothing_is_said_of_a_prm() -> None:
    batch = scored(MIDDLING, ref=None)
    update = PolicyUpdate(torch.full((2, 3), -1.0), {})
    found = figures.of_batch(TrainBatch(batch, None, torch.ones(2, 3)), update, config())
    assert not [name for name in found if name.startswith("prm/")]
    assert found["policy/outcome_return_mean"] == pytest.approx(2 / 5)
    assert found["policy/advantage_std"] == 0


@pytest.mark.parametrize(
    ("old", "threshold", "alarm"), [(-1.5, 0.2, 0.0), (-1.5, 0.1, 1.0), (NAN, 9.0, 1.0)]
)
def test_the_alarm_is_for_a_mismatch_above_the_threshold(
    old: float, threshold: float, alarm: float
) -> None:
    """The engine's log-probs are -1: with the trainer's at -1.5 the k3 estimate is 0.1065."""
    batch = TrainBatch(scored(MIDDLING), None, torch.ones(2, 3))
    update = PolicyUpdate(torch.full((2, 3), old), {})
    found = figures.of_batch(batch, update, config(rollout={"mismatch_alarm": threshold}))
    assert found["rollout/mismatch_alarm"] == alarm
    silent = figures.of_batch(batch, update, config(rollout={"mismatch_alarm": None}))
    assert found.keys() - silent.keys() == {"rollout/mismatch_alarm"}


def test_seconds_are_summed_and_tokens_counted_per_second_of_generation() -> None:
    seconds = {"time/generate_s": 4.0, "time/score_s": 1.5}
    assert figures.of_time(seconds, tokens=100) == {
        **seconds,
        "time/step_s": 5.5,
        "rollout/tokens_per_s": 25.0,
    }
    parts = {"time/busy_generating_s": 2.5, "time/idle_long_tail_s": 1.0}
    assert figures.of_time(seconds | parts, tokens=100)["time/step_s"] == 5.5
    assert figures.of_time({"time/score_s": 1.5}, tokens=100) == {
        "time/score_s": 1.5,
        "time/step_s": 1.5,
    }


def test_who_can_not_fill_a_batch_is_told_why_and_the_window_is_inclusive() -> None:
    knobs = config(
        rollout={"prompts_per_step": 6, "max_rounds": 2},
        filter={"min_accuracy": 0.25, "max_accuracy": 0.75},
    )
    all_right, one_right = group([1, 1, 1, 1], [1] * 4), group([1, 0, 0, 0], [1] * 4)
    seen = [EASY, HARD, HARD, all_right, one_right]  # accuracies 0.75, 0, 0, 1, 0.25
    message = figures.explain_unfilled(knobs, 7, [EASY, one_right], seen)
    assert message.startswith(
        "step 7: only 2 of 6 prompts passed the accuracy window [0.25, 0.75] in 2 rounds: of 5 "
        "prompts, 2 were too hard and 1 too easy (mean accuracy 0.400). "
    )
    for knob in ("filter.min_accuracy", "filter.max_accuracy", "rollout.max_rounds"):
        assert knob in message


def test_what_other_filters_took_is_told_with_their_knobs() -> None:
    knobs = config(filter={"zero_variance": "drop", "truncated": "drop"})
    cut = group([1, 0, 0, 0], [1] * 4, cut=1)
    message = figures.explain_unfilled(knobs, 7, [EASY], [EASY, HARD, EVEN, cut, cut])
    assert (
        "of 5 prompts, 1 were too hard and 0 too easy, 1 without variance (filter.zero_variance), "
        "2 with a truncated response (filter.truncated) (mean accuracy"
    ) in message
