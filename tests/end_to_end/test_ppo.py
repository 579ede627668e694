"""PPO by the real command: with and without PRIME, offloaded, stopped and continued."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from job import ROOT, Job, layout, reproducible
from test_train import documented

from megatron_prime.algorithm.filtering import passes
from megatron_prime.runtime.rollout_files import read_steps

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ALONE = layout(tp=1, pp=1)
MASK = ["--filter.truncated=mask", "--rollout.max_response_length=15"]
CRITIC = [
    "--advantage.estimator=gae",
    "--critic.lr=2e-3",
    "--critic.mini_batch_size=16",
    "--critic.micro_batch_tokens=128",
]


def figures(job: Job, name: str) -> dict[int, dict[str, float]]:
    return {step: reproducible(record) for step, record in job.metrics(name).items()}


def mean_outcome(job: Job, name: str, knobs: list[str]) -> float:
    """Of the ended responses that step 1 trained on, by their tokens: what the verifier gave."""
    config = job.config(name, *knobs)
    groups = list(read_steps(job.run(name) / "rollouts"))
    kept = [group for group in groups if passes(group, config.filter)]
    given = [
        (len(rollout.response_ids), reward)
        for group in kept[: config.rollout.prompts_per_step]
        for rollout, reward in zip(group.rollouts, group.outcome_rewards, strict=True)
        if rollout.finish_reason != "length"
    ]
    return sum(n * reward for n, reward in given) / sum(n for n, _ in given)


def test_of_the_outcome_alone(job: Job) -> None:
    """Tied to the reference, the critic in bf16, without cut responses.

    Straight; and offloaded, with a stop after step 2: bit for bit.
    """
    knobs = ["--advantage.process_weight=0", "--evaluate.every=0", *CRITIC, *MASK, *ALONE]
    knobs += ["--policy.loss.kl_coefficient=0.1", "--precision.critic.dtype=bf16"]
    knobs += ["--debug.save_rollouts=true"]
    job.start_alone("train", "ppo", *knobs, "--run.steps=4")
    steps = figures(job, "ppo")
    first, last = steps[1], steps[4]
    told = {n for n in documented() if n.startswith("critic/") and not n.endswith("_steps")}
    assert {n for n in first if n.startswith("critic/")} == told - {"critic/loss_scale"}
    assert first["critic/value_mean"] == 0, "a head of zeros"
    assert first["critic/explained_variance"] == 0
    wanted = mean_outcome(job, "ppo", knobs)
    assert first["critic/return_mean"] == pytest.approx(wanted, abs=1e-6)
    assert wanted != pytest.approx(first["policy/outcome_return_mean"], abs=1e-3), "of all tokens"
    assert last["critic/value_mean"] != 0
    assert all(steps[step]["critic/grad_norm"] > 0 for step in (1, 2, 3, 4))
    assert last["critic/loss"] < first["critic/loss"]
    assert not any(name.startswith("prm/") for name in last)
    assert 0 <= first["policy/ref_kl"] < last["policy/ref_kl"], "it starts at the reference"

    knobs += ["--memory.offload=always"]
    job.start_alone("train", "ppo_twice", *knobs, "--run.steps=2")
    job.start_alone("train", "ppo_twice", *knobs, "--run.steps=4")
    run = job.run("ppo_twice")
    again = figures(job, "ppo_twice")
    again[2] = {name: again[2][name] for name in steps[2]}  # its last step was evaluated
    assert again == steps
    saved = {path.name for path in (run / "checkpoints" / "step_000004").iterdir()}
    assert saved == {"manifest.json", "policy", "critic", "rng", "run.json"}
    go_on_with_the_critic(job, run / "checkpoints" / "step_000004", knobs)
    assert "time/update_critic_s" in job.metrics("ppo_twice")[4]


def go_on_with_the_critic(job: Job, checkpoint: Path, knobs: list[str]) -> None:
    """Another run starts from it, by way of the converting tool."""
    out = job.folder / "critic_hf"
    tool = [sys.executable, "tools/convert_megatron_to_hf.py", "--model=critic", "--verify"]
    subprocess.run([*tool, f"--checkpoint={checkpoint}", f"--out={out}"], cwd=ROOT, check=True)
    job.start_alone("train", "ppo_again", *knobs, f"--critic.hf={out}", "--run.steps=1")
    assert figures(job, "ppo_again")[1]["critic/value_mean"] != 0


def test_with_prime_on_four_ranks(job: Job) -> None:
    """TP 2 × PP 2; the critic learns the sum of both rewards, with and without cut responses."""
    knobs = [*CRITIC, "--precision.critic.dtype=fp32", "--evaluate.every=0", "--run.steps=2"]
    job.start("train", 4, "ppo_prime", *knobs)
    steps = figures(job, "ppo_prime")
    for step in (1, 2):  # batch_norm divides process rewards by the largest return
        found = steps[step]
        process = found["prm/process_return_mean"] / (found["prm/process_return_abs_max"] + 1e-6)
        wanted = found["policy/outcome_return_mean"] + process
        assert found["critic/return_mean"] == pytest.approx(wanted, abs=1e-4)
        assert abs(process) > 1e-3
    assert steps[1]["critic/value_mean"] == 0 != steps[2]["critic/value_mean"]
    saved = {path.name for path in (job.run("ppo_prime") / "checkpoints" / "step_000002").iterdir()}
    assert saved == {"manifest.json", "policy", "prm", "critic", "rng", "run.json"}

    job.start("train", 4, "ppo_masked", *knobs, *MASK)
    masked = figures(job, "ppo_masked")
    assert 0 < max(masked[step]["policy/masked"] for step in (1, 2)) < 1
    for found in (steps[1], steps[2], masked[1], masked[2]):
        assert found["policy/advantage_mean"] == pytest.approx(0, abs=1e-5)
        assert found["policy/advantage_std"] == pytest.approx(1, abs=1e-4)
        assert found["policy/grad_norm"] > 0
        assert found["critic/grad_norm"] > 0
