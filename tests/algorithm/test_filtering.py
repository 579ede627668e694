from __future__ import annotations

import pytest
import torch

from megatron_prime.algorithm.filtering import passes, why_not, within_accuracy_window
from megatron_prime.config import FilterSection
from megatron_prime.types import Prompt, Rollout, VerifiedGroup


def test_both_ends_of_the_window_are_inside(vectors):
    for row in vectors.raw("filter.table"):
        outcomes = torch.tensor(row["acc"], dtype=torch.float64)
        kept = within_accuracy_window(outcomes, len(outcomes), 0.2, 0.8)
        assert kept.tolist() == [row["keep_inclusive"]], row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ([1, 0, 0, 0, 0], True),
        ([1, 1, 1, 1, 0], True),
        ([0.2, 0.2, 0.2, 0.2, 0.2], True),
        ([0.8, 0.8, 0.8, 0.8, 0.8], True),
        ([0.7, 0.9, 0.6, 1.0, 0.8], True),
        ([0, 0, 0, 0, 0], False),
        ([1, 1, 1, 1, 1], False),
        ([0.9, 0.9, 0.8, 0.8, 0.8], False),
        ([0.1, 0.1, 0.2, 0.2, 0.2], False),
    ],
)
def test_the_ends_hold_in_every_type(dtype, outcomes, kept):
    rewards = torch.tensor(outcomes, dtype=dtype)
    assert within_accuracy_window(rewards, 5, 0.2, 0.8).tolist() == [kept]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_counts_of_right_answers_need_no_tolerance(dtype):
    rewards = torch.tensor([1, 0, 0, 0, 0, 1, 1, 1, 1, 0], dtype=dtype)
    assert within_accuracy_window(rewards, 5, 0.2, 0.8).tolist() == [True, True]
    assert within_accuracy_window(rewards, 5, 0.2000001, 0.7999999).tolist() == [False, False]


def test_each_group_is_judged_by_itself():
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    kept = within_accuracy_window(rewards, 2, 0.2, 0.8)
    assert kept.dtype == torch.bool
    assert kept.tolist() == [False, True, False]


def test_a_window_upside_down_is_refused():
    with pytest.raises(ValueError, match=r"found .*\[0\.8, 0\.2\], wanted .*filter\.min_accuracy"):
        within_accuracy_window(torch.zeros(4), 4, 0.8, 0.2)


def test_partial_groups_are_refused():
    with pytest.raises(ValueError, match=r"rollout\.group_size"):
        within_accuracy_window(torch.zeros(6), 4, 0.2, 0.8)


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [(0.2, 0.75, True), (0.2, 0.7, False), (0.75, 1, True), (0.8, 1, False)],
)
def test_a_group_passes_by_the_share_of_its_right_answers(low, high, kept):
    rollout = Rollout((3,), (-0.5,), "stop", 0, "")
    prompt = Prompt(1, (2,), "4", "math", "test")
    group = VerifiedGroup(prompt, (rollout,) * 4, (1.0, 0.0, 1.0, 1.0), 0)
    assert passes(group, FilterSection(min_accuracy=low, max_accuracy=high)) is kept


def group_of(outcomes, cut=0):
    """A group whose first `cut` responses were cut."""
    prompt = Prompt(1, (2,), "4", "math", "test")
    rollouts = tuple(
        Rollout((3,), (-0.5,), "length" if i < cut else "stop", 0, "") for i in range(len(outcomes))
    )
    return VerifiedGroup(prompt, rollouts, tuple(outcomes), 0)


OPEN = FilterSection(min_accuracy=0.0, max_accuracy=1.0)


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ([0.5, 0.5, 0.5, 0.5], False),  # inside the window, and nothing to learn from
        ([0.5, 0.5, 0.5, 0.6], True),
        ([1.0, 0.0, 1.0, 1.0], True),
        ([0.0, 0.0], False),
        ([1.0, 1.0], False),
    ],
)
def test_groups_without_variance(outcomes, kept):
    group = group_of(outcomes)
    assert passes(group, OPEN)
    assert passes(group, OPEN.model_copy(update={"zero_variance": "drop"})) is kept


@pytest.mark.parametrize(("cut", "kept"), [(0, True), (1, False), (4, False)])
def test_groups_with_a_truncated_response(cut, kept):
    group = group_of([1.0, 0.0, 1.0, 0.0], cut)
    assert passes(group, FilterSection())
    assert passes(group, FilterSection(truncated="drop")) is kept


def test_the_first_reason_counts():
    every = FilterSection(zero_variance="drop", truncated="drop")
    assert why_not(group_of([0.0, 0.0], cut=1), every) == "hard"
    assert why_not(group_of([1.0, 1.0], cut=1), every) == "easy"
    assert why_not(group_of([0.5, 0.5], cut=1), every) == "zero_variance"
    assert why_not(group_of([0.0, 1.0], cut=1), every) == "truncated"
    assert why_not(group_of([0.0, 1.0]), every) is None


def test_a_window_of_everything_lets_everything_pass():
    for outcomes in ([0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.0, 1.0]):
        assert passes(group_of(outcomes, cut=2), OPEN)
