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
from launch import run_ranks

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


@pytest.fixture(scope="module")
def broken(job: Job) -> subprocess.CompletedProcess[str]:
    """A run whose PRM's second update is not finite."""
    return run("train", *job.arguments("nan", *ALONE, "--prm.lr=1e30", "--run.steps=2"))


def test_a_nan_stops_the_run_and_is_replayed(
    job: Job, broken: subprocess.CompletedProcess[str]
) -> None:
    assert broken.returncode == 1
    kept = job.run("nan") / "not_finite" / "prm_update_0"
    assert "numbers that are not finite" in broken.stderr
    assert "rank 0: " in broken.stderr
    assert f"python -m megatron_prime replay {kept}" in broken.stderr
    assert not (job.run("nan") / "checkpoints").exists() or not list(
        (job.run("nan") / "checkpoints").glob("step_*")
    )
    again = run("replay", kept)
    assert again.returncode == 1
    assert "first outputs that are not finite:\nrank 0: output of decoder.layers.0" in again.stderr


@pytest.mark.usefixtures("broken")
def test_a_nan_is_replayed_in_another_layout_and_type(job: Job) -> None:
    kept = job.run("nan") / "not_finite" / "prm_update_0"
    knobs = ("--megatron.tensor_model_parallel_size=2", "--precision.prm.dtype=bf16")
    with pytest.raises(AssertionError) as again:  # with the output of both ranks
        run_ranks("megatron_prime", 2, ["replay", kept, *knobs])
    output = str(again.value)
    assert "first outputs that are not finite:" in output
    for rank in (0, 1):
        assert f"rank {rank}: output of decoder.layers.0" in output


def test_a_nan_in_fine_tuning_is_kept_and_replayed(job: Job) -> None:
    knobs = (f"--model.hf={job.folder / 'shape'}", "--sft.lr=1e30", "--debug.on_not_finite=skip")
    knobs += (f"--sft.output={job.folder / 'sft_nan_hf'}", "--sft.warmup_steps=0")
    found = run("sft", *job.arguments("sft_nan", *ALONE, *knobs))
    assert found.returncode == 1
    assert "sft: all 1 mini-batches of an update were skipped" in found.stderr
    kept = job.run("sft_nan") / "not_finite" / "sft_update_0"
    again = run("replay", kept)
    assert again.returncode == 1
    assert "a mini-batch of 32 rollouts gave numbers that are not finite" in again.stderr
    assert "first outputs that are not finite:\nrank 0: output of " in again.stderr


def test_replaying_something_else_is_refused(tmp_path: Path) -> None:
    found = run("replay", tmp_path)
    assert found.returncode == 2
    assert f"no config file {tmp_path / 'config.toml'}" in found.stderr
