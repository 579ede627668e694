"""Recorded rollouts in the roles of prompts, engine and verifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from given import Given

from megatron_prime.config import ConfigError
from megatron_prime.rollout.recorded import RecordedRollouts
from megatron_prime.runtime.rollout_files import RolloutFileError, write_step
from megatron_prime.types import Prompt, Rollout, Sampling, VerifiedGroup, VersionSpan

SAMPLING = Sampling(samples=2, temperature=1.0, max_tokens=8, seed=0)


def group(prompt_id: int) -> VerifiedGroup:
    prompt = Prompt(prompt_id, (5, prompt_id), "3", "math", "digits")
    rollouts = (
        Rollout((7,), (-0.1,), "stop", 4, "a"),
        Rollout((8, 9), (-1.0, -2.0), "length", 4, "b", (VersionSpan(1, 3),)),
    )
    return VerifiedGroup(prompt, rollouts, (1.0, 0.0), 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_step(tmp_path, 1, [group(n) for n in range(3)])
    write_step(tmp_path, 2, [group(n) for n in (1, 5, 6)])
    return tmp_path


def test_groups_are_played_back_as_the_present_policys(folder: Path) -> None:
    ranks = [RecordedRollouts(folder, rank, 2) for rank in range(2)]
    for step in ([0, 1, 2], [1, 5, 6]):
        played = {}
        for rank in ranks:
            prompts = rank.take(3)
            assert [prompt.prompt_id for prompt in prompts] == step
            rank.load_weights(Given([]), version=9)
            for verified in rank.verify(rank.generate(prompts, SAMPLING)):
                played[verified.prompt.prompt_id] = verified
        for number in step:
            recorded = group(number)
            now = tuple(replace(r, policy_version=9, older_spans=()) for r in recorded.rollouts)
            assert played[number] == replace(recorded, rollouts=now)


def test_the_end_of_the_recording_is_told(folder: Path) -> None:
    recorded = RecordedRollouts(folder, 0, 1)
    recorded.take(3)
    with pytest.raises(RolloutFileError, match=r"3 of 6 groups in .* are left, wanted 4 more"):
        recorded.take(4)


def test_another_round_size_or_group_size_is_refused(folder: Path) -> None:
    recorded = RecordedRollouts(folder, 0, 1)
    with pytest.raises(RolloutFileError, match=r"a prompt twice among 4 groups"):
        recorded.take(4)
    recorded = RecordedRollouts(folder, 0, 1)
    prompts = recorded.take(3)
    with pytest.raises(ConfigError, match=r"found 4, but .* was recorded with 2"):
        list(recorded.generate(prompts, replace(SAMPLING, samples=4)))


def test_a_resumed_run_goes_on_where_it_was(folder: Path) -> None:
    first, second = RecordedRollouts(folder, 0, 1), RecordedRollouts(folder, 0, 1)
    first.take(3)
    second.load_state_dict(first.state_dict())
    assert [prompt.prompt_id for prompt in second.take(3)] == [1, 5, 6]


def test_what_was_recorded_between_stop_and_resume_comes_in_its_turn(folder: Path) -> None:
    first = RecordedRollouts(folder, 0, 1)
    first.take(3)
    write_step(folder, 3, [group(n) for n in (7, 8)])
    resumed = RecordedRollouts(folder, 0, 1)
    resumed.load_state_dict(first.state_dict())
    assert [prompt.prompt_id for prompt in resumed.take(4)] == [1, 5, 6, 7]


class Seen:
    """A tally that has enough from the start."""

    def __init__(self) -> None:
        self.groups: list[VerifiedGroup] = []

    def add(self, group: VerifiedGroup) -> None:
        self.groups.append(group)

    def reached(self) -> bool:
        return True


def test_all_is_played_back_and_told_even_if_there_is_enough(folder: Path) -> None:
    recorded, enough = RecordedRollouts(folder, 0, 1), Seen()
    prompts = recorded.take(3)
    verified = recorded.verify(recorded.generate(prompts, SAMPLING, enough), enough)
    assert [group.prompt for group in verified] == prompts
    assert enough.groups == verified
    assert recorded.take_metrics() == {}
