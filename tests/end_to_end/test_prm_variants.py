"""The PRM's other references and updates, by the real command, with checkpoints and a resume."""

from __future__ import annotations

import pytest
from job import Job, layout, reproducible

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ALONE = layout(tp=1, pp=1)


def figures(job: Job, name: str) -> dict[int, dict[str, float]]:
    return {step: reproducible(record) for step, record in job.metrics(name).items()}


def test_the_policy_as_reference(job: Job) -> None:
    """Straight through, and with a stop after step 2: the same, bit for bit."""
    knobs = ["--prm.reference=policy", "--prm.loss=nca", "--evaluate.every=1", *ALONE]
    job.start_alone("train", "of_policy", *knobs, "--run.steps=3")
    job.start_alone("train", "of_policy_twice", *knobs, "--run.steps=2")
    job.start_alone("train", "of_policy_twice", *knobs, "--run.steps=3")
    straight = figures(job, "of_policy")
    assert figures(job, "of_policy_twice") == straight
    assert straight[1]["prm/loss"] > 0.5
    assert straight[3]["prm/process_return_abs_max"] > 1e-3
    assert straight[3]["policy/grad_norm"] > 0
    assert [straight[step]["prm/staleness"] for step in (1, 2, 3)] == [0, 1, 1]


def test_an_offline_prm(job: Job) -> None:
    """It comes from elsewhere, gives rewards from step 1 on, learns nothing and isn't saved."""
    job.start_alone("train", "elsewhere", "--advantage.process_weight=0", "--run.steps=1", *ALONE)
    knobs = ["--prm.forward=frozen", "--prm.measure_after=false", *ALONE]
    knobs += [f"--prm.hf={job.run('elsewhere') / 'hf'}", "--memory.offload=always"]
    job.start_alone("train", "offline", *knobs, "--run.steps=2")
    job.start_alone("train", "offline", *knobs, "--run.steps=3")
    steps = figures(job, "offline")
    assert list(steps) == [0, 1, 2, 3]
    assert not {"prm/loss", "prm/grad_norm", "prm/lr"} & steps[3].keys()
    assert steps[1]["prm/process_return_abs_max"] > 1e-4
    assert [steps[step]["prm/staleness"] for step in (1, 2, 3)] == [0, 1, 2]
    saved = {path.name for path in (job.run("offline") / "checkpoints" / "step_000003").iterdir()}
    assert saved == {"manifest.json", "policy", "rng", "run.json"}
