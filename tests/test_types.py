"""Versions on tokens, and what the types refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_prime.errors import RunError
from megatron_prime.types import (
    OldLogprobs,
    Prompt,
    Rollout,
    RolloutBatch,
    TokenSequence,
    VerifiedGroup,
    VersionSpan,
    unanswered,
)

WHOLE = Rollout((7, 8, 9), (-1.0, -1.0, -1.0), "stop", 4, "789")
CONTINUED = replace(WHOLE, older_spans=(VersionSpan(1, 2), VersionSpan(1, 3)))


def group(*rollouts: Rollout, number: int = 5) -> VerifiedGroup:
    prompt = Prompt(number, (1,), "4", "math", "fake")
    return VerifiedGroup(prompt, rollouts, (1.0,) * len(rollouts), 0)


def test_spans_cover_the_whole_response() -> None:
    assert WHOLE.versions == (VersionSpan(3, 4),)
    assert CONTINUED.versions == (VersionSpan(1, 2), VersionSpan(1, 3), VersionSpan(1, 4))


def test_the_last_token_is_of_the_rollouts_version() -> None:
    with pytest.raises(ValueError, match="found older_spans of 3 tokens in a response of 3"):
        replace(WHOLE, older_spans=(VersionSpan(3, 2),))


@pytest.mark.parametrize(
    ("rollouts", "found"),
    [
        ((replace(WHOLE, policy_version=3), WHOLE), r"\[3, 4\]"),
        ((CONTINUED,), r"\[2, 3, 4\]"),  # inside one response
    ],
)
def test_mixed_versions_in_one_group_are_refused(rollouts: tuple[Rollout, ...], found: str) -> None:
    assert group(WHOLE, WHOLE).policy_version == 4
    with pytest.raises(ValueError, match=rf"prompt 5: tokens of policy versions {found}"):
        _ = group(*rollouts).policy_version


def test_prompts_without_a_group_keep_their_order() -> None:
    groups = [group(WHOLE, number=number) for number in range(5)]
    prompts = [groups[number].prompt for number in (4, 0, 3, 1, 2)]
    assert unanswered(prompts, [groups[0], groups[1]]) == [prompts[0], prompts[2], prompts[4]]
    assert unanswered(prompts, groups) == []


def test_old_logprobs_of_rows_that_were_not_scored_are_somebody_elses() -> None:
    """Rows 2 and 0 of three were scored; the widest is row 1, with three tokens."""
    lengths = torch.tensor([1, 3, 2])
    mask = torch.arange(3) < lengths[:, None]
    batch = RolloutBatch((), 1, mask, torch.zeros(3), torch.zeros(3, 3))
    batch = replace(batch, sequences=(TokenSequence((5, 6), 1),) * 3)
    old = OldLogprobs.scored(batch, torch.tensor([2, 0]), torch.tensor([[-2.0, -3], [-1, 0]]))
    other = torch.full((3, 3), -9.0)
    filled = torch.tensor([[-1.0, 0, 0], [-9, -9, -9], [-2, -3, 0]])
    assert torch.equal(old.or_else(other), filled)
    assert torch.equal(old.or_else(other[:, :2]), filled[:, :2]), "of a narrower micro-batch"
    rows = torch.tensor([1, 2])
    assert torch.equal(old.select(rows).or_else(other[rows]), filled[rows])
    assert torch.equal(OldLogprobs.none(batch).or_else(other), other)
    assert old.logprobs[1].isnan().all(), "nobody can take them by mistake"
    assert not old.or_else(other.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("rows", "group_size"),
    [([0, 1, 2, 3], 2), ([4, 5, 0, 1], 2), ([1, 2], 1), ([1, 0], 1), ([0, 1, 2], 1), ([3], 1)],
)
def test_only_whole_groups_stay_groups(rows: list[int], group_size: int) -> None:
    batch = RolloutBatch.from_groups([group(WHOLE, WHOLE, number=number) for number in range(3)])
    assert batch.select(torch.tensor(rows)).group_size == group_size


def test_responses_that_were_cut_are_not_learnt_from_if_that_was_asked_for() -> None:
    cut = replace(WHOLE, finish_reason="length")
    groups = [group(WHOLE, cut), group(cut, WHOLE, number=1)]
    batch = RolloutBatch.from_groups(groups, masked=True)
    assert batch.learns is not None
    assert batch.learns.tolist() == [True, False, False, True]
    part = batch.select(torch.tensor([3, 1])).learns
    assert part is not None
    assert part.tolist() == [True, False]
    assert RolloutBatch.from_groups(groups).learns is None


def test_a_batch_of_cut_responses_alone_ends_the_run_if_they_are_masked() -> None:
    cut = replace(WHOLE, finish_reason="length")
    with pytest.raises(RunError, match=r'all 2 responses .* set filter.truncated = "keep"'):
        RolloutBatch.from_groups([group(cut, cut)], masked=True)
    assert len(RolloutBatch.from_groups([group(cut, cut)]).sequences) == 2
