"""Whole runs in which everything that a phase does not need is away: the same figures, bit for bit.

The offloaded run also stops after step 2 and goes on, so it was saved from the host's copies.
"""

from __future__ import annotations

import pytest
from job import Job, reproducible

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ALWAYS = "--memory.offload=always"
HALF = [f"--precision.{model}.dtype=bf16" for model in ("policy", "prm", "reference")]
ONE_RANK = ["--megatron.tensor_model_parallel_size=1", "--megatron.pipeline_model_parallel_size=1"]


def figures(job: Job, name: str) -> dict[int, dict[str, float]]:
    return {step: reproducible(record) for step, record in job.metrics(name).items()}


def test_four_ranks_in_fp32(job: Job, full: str) -> None:
    job.start("train", 4, "offloaded", ALWAYS, "--run.steps=2")
    job.start("train", 4, "offloaded", ALWAYS)
    expected, found = figures(job, full), figures(job, "offloaded")
    found[2] = {n: v for n, v in found[2].items() if not n.startswith("evaluate/")}  # a last step's
    assert found == expected
    resident, offloaded = job.metrics(full), job.metrics("offloaded")
    for step in range(1, 7):
        for phase in ("generate", "score", "update_prm", "update_policy"):
            name = f"memory/{phase}_device_gib"
            assert offloaded[step][name] < 0.5 * resident[step][name]
        assert offloaded[step]["memory/moved_to_host_gib"] > 0
        assert resident[step]["memory/moved_to_device_gib"] == 0


def test_one_rank_in_bf16(job: Job) -> None:
    for name, *knobs in (("half", "--memory.offload=never"), ("half-offloaded", ALWAYS)):
        job.start_alone("train", name, *HALF, *ONE_RANK, "--run.steps=3", *knobs)
    assert figures(job, "half-offloaded") == figures(job, "half")
