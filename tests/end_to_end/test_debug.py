"""Rollouts to disk and back, and a run that meets a NaN: by the real commands, one process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from job import ROOT, Job, layout, reproducible

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
ALONE = layout(tp=1, pp=1)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in one process, its output kept."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_prime", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        capture_output=True,
        text=True,
    )


def test_training_on_recorded_rollouts_repeats_the_run(job: Job) -> None:
    short = (*ALONE, "--run.steps=2", "--evaluate.max_prompts=4")
    job.start_alone("train", "live", *short, "--debug.save_rollouts=true")
    recorded = job.run("live") / "rollouts"
    assert [path.name for path in sorted(recorded.iterdir())] == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    job.start_alone("train", "played", *short, f"--debug.rollouts_from={recorded}")
    live, played = job.metrics("live"), job.metrics("played")
    for step in (1, 2):
        of_live = {k: v for k, v in reproducible(live[step]).items() if "evaluate/" not in k}
        of_played = {k: v for k, v in reproducible(played[step]).items() if "evaluate/" not in k}
        assert of_live == of_played


def test_rollouts_alone_are_those_of_a_first_step(job: Job) -> None:
    knobs = ("--run.steps=2", "--rollout.prompts_per_round=5")
    job.start_alone("rollout", "alone", *knobs)
    files = sorted((job.run("alone") / "rollouts").iterdir())
    groups = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    assert [len(step) for step in groups] == [5, 5]
    assert all(len(group["rollouts"]) == 4 for step in groups for group in step)
    known = [json.loads(line) for line in (job.folder / "train.jsonl").read_text().splitlines()]
    for group in groups[0]:
        row = known[group["prompt"]["prompt_id"]]
        assert group["prompt"]["ground_truth"] == row["reward_model"]["ground_truth"]
        for rollout, reward in zip(group["rollouts"], group["outcome_rewards"], strict=True):
            assert reward == (rollout["text"].endswith(rf"\boxed{{{row_digit(row)}}}"))
            assert len(rollout["response_ids"]) == len(rollout["rollout_logprobs"])
    assert job.metrics("alone")[2]["filter/accuracy"] == mean_reward(groups[1])


def row_digit(row: dict[str, Any]) -> str:
    return str(row["reward_model"]["ground_truth"])


def mean_reward(groups: list[dict[str, Any]]) -> Any:
    rewards = [reward for group in groups for reward in group["outcome_rewards"]]
    return pytest.approx(sum(rewards) / len(rewards))


def test_a_nan_stops_the_run_and_is_replayed(job: Job) -> None:
    found = run("train", *job.arguments("nan", *ALONE, "--prm.lr=1e30", "--run.steps=2"))
    assert found.returncode == 1
    kept = job.run("nan") / "not_finite" / "prm_update_0"
    assert "numbers that are not finite" in found.stderr
    assert "rank 0: " in found.stderr
    assert f"python -m megatron_prime replay {kept}" in found.stderr
    assert not (job.run("nan") / "checkpoints").exists() or not list(
        (job.run("nan") / "checkpoints").glob("step_*")
    )
    again = run("replay", kept)
    assert again.returncode == 1
    assert "first outputs that are not finite:\nrank 0: output of decoder.layers.0" in again.stderr


def test_replaying_something_else_is_refused(tmp_path: Path) -> None:
    found = run("replay", tmp_path)
    assert found.returncode == 2
    assert f"no config file {tmp_path / 'config.toml'}" in found.stderr
