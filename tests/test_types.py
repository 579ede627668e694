"""Versions on tokens, and what the types refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prime.types import Prompt, Rollout, VerifiedGroup, VersionSpan, unanswered

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
