"""PPO by the real command: with and without PRIME, offloaded, stopped and continued."""

from __future__ import annotations

import pytest
from job import Job, layout, reproducible

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ALONE = layout(tp=1, pp=1)
CRITIC = [
    "--advantage.estimator=gae",
    "--precision.critic.dtype=fp32",
    "--critic.lr=2e-3",
    "--critic.mini_batch_size=16",
    "--critic.micro_batch_tokens=128",
]


def figures(job: Job, name: str) -> dict[int, dict[str, float]]:
    return {step: reproducible(record) for step, record in job.metrics(name).items()}


def test_of_the_outcome_alone(job: Job) -> None:
    """Tied to the reference. Straight; and offloaded, with a stop after step 2: bit for bit."""
    knobs = ["--advantage.process_weight=0", "--evaluate.every=0", *CRITIC, *ALONE]
    knobs += ["--policy.loss.kl_coefficient=0.1"]
    job.start_alone("train", "ppo", *knobs, "--run.steps=4")
    steps = figures(job, "ppo")
    first, last = steps[1], steps[4]
    assert first["critic/value_mean"] == 0, "a head of zeros"
    assert first["critic/explained_variance"] == 0
    assert first["critic/return_mean"] == pytest.approx(first["filter/accuracy"], abs=0.2)
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
    assert "time/update_critic_s" in job.metrics("ppo_twice")[4]


def test_with_prime_on_four_ranks(job: Job) -> None:
    """TP 2 × PP 2; the critic learns both rewards, and what it said is what is expected of it."""
    knobs = [*CRITIC, "--filter.truncated=mask", "--rollout.max_response_length=15"]
    job.start("train", 4, "ppo_prime", *knobs, "--run.steps=3", "--evaluate.every=0")
    steps = figures(job, "ppo_prime")
    assert 0 < max(steps[step]["policy/masked"] for step in (1, 2, 3)) < 1
    assert steps[1]["prm/process_return_abs_max"] > 0
    assert steps[1]["critic/value_mean"] == 0
    for step in (2, 3):
        found = steps[step]
        assert found["critic/value_mean"] != 0
        assert found["critic/return_mean"] != pytest.approx(found["filter/accuracy"], abs=1e-6)
        assert found["policy/grad_norm"] > 0
    saved = {path.name for path in (job.run("ppo_prime") / "checkpoints" / "step_000003").iterdir()}
    assert saved == {"manifest.json", "policy", "prm", "critic", "rng", "run.json"}
