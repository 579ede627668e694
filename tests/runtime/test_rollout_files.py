"""Verified groups on disk come back as they were; damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prime.runtime.rollout_files import RolloutFileError, read_steps, write_step
from megatron_prime.types import Prompt, Rollout, VerifiedGroup, VersionSpan


def group(prompt_id: int, rewards: tuple[float, ...] = (1.0, 0.0)) -> VerifiedGroup:
    prompt = Prompt(prompt_id, (5, 6), "3", "math", "digits")
    rollouts = tuple(Rollout((7, 8), (-0.1, -1e-7), "stop", 4, "ü\n") for _ in rewards)
    return VerifiedGroup(prompt, rollouts, rewards, 1)


def test_steps_come_back_in_order_and_exactly(tmp_path: Path) -> None:
    write_step(tmp_path / "rollouts", 10, [group(3)])
    write_step(tmp_path / "rollouts", 2, [group(1), group(2)])
    write_step(tmp_path / "rollouts", 10, [group(9, (0.5,))])  # a resumed run writes it again
    assert list(read_steps(tmp_path / "rollouts")) == [group(1), group(2), group(9, (0.5,))]


def test_versions_of_tokens_are_kept_and_may_be_missing(tmp_path: Path) -> None:
    """Files of before there were any say nothing of older versions."""
    mixed = Rollout((7, 8, 9), (-0.1, -0.2, -0.3), "stop", 4, "x", (VersionSpan(2, 3),))
    group_of_two = replace(group(1), rollouts=(mixed, group(1).rollouts[0]))
    write_step(tmp_path, 1, [group_of_two])
    assert list(read_steps(tmp_path)) == [group_of_two]
    path = tmp_path / "step_000001.jsonl"
    record = json.loads(path.read_text())
    assert record["rollouts"][0]["older_spans"] == [{"tokens": 2, "version": 3}]
    for rollout in record["rollouts"]:
        del rollout["older_spans"]
    path.write_text(json.dumps(record) + "\n")
    (old,) = read_steps(tmp_path)
    assert old == replace(group_of_two, rollouts=(replace(mixed, older_spans=()), old.rollouts[1]))
    record["rollouts"][0]["older_spans"] = [{"tokens": 3, "version": 3}]  # all of them
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(RolloutFileError, match="line 1: not a verified group"):
        list(read_steps(tmp_path))


def test_an_empty_folder_and_a_cut_file(tmp_path: Path) -> None:
    with pytest.raises(RolloutFileError, match=r"found no step_\*.jsonl in .*, wanted what"):
        list(read_steps(tmp_path))
    write_step(tmp_path, 1, [group(1), group(2)])
    path = tmp_path / "step_000001.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RolloutFileError, match=r"step_000001.jsonl, line 2: not a verified group"):
        list(read_steps(tmp_path))


def test_a_file_whose_writing_failed_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    """The name appears only with the whole content; half of one under another is not read."""

    def no_space(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:30])
        raise OSError("no space left")

    write_step(tmp_path, 1, [group(1)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", no_space)
        for step in (1, 2):
            with pytest.raises(OSError, match="no space"):
                write_step(tmp_path, step, [group(2)])
    assert list(read_steps(tmp_path)) == [group(1)]
