"""Whole runs in which everything that a phase does not need is away: the same figures, bit for bit.

The offloaded run also stops after step 2 and goes on, so it was saved from the host's copies.
"""

from __future__ import annotations

import pytest
from job import Job, reproducible

from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.residency import NEEDED, RESIDENT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ALWAYS = "--memory.offload=always"
HALF = [f"--precision.{model}.dtype=bf16" for model in ("policy", "prm", "reference")]
ONE_RANK = ["--megatron.tensor_model_parallel_size=1", "--megatron.pipeline_model_parallel_size=1"]


def figures(job: Job, name: str) -> dict[int, dict[str, float]]:
    return {step: reproducible(record) for step, record in job.metrics(name).items()}


@pytest.mark.slow
def test_four_ranks_in_fp32(job: Job, full: str) -> None:
    job.start("train", 4, "offloaded", ALWAYS, "--run.steps=2")
    job.start("train", 4, "offloaded", ALWAYS)
    expected, found = figures(job, full), figures(job, "offloaded")
    found[2] = {n: v for n, v in found[2].items() if not n.startswith("evaluate/")}  # a last step's
    assert found == expected
    assert saved_bytes(job, "offloaded") == pytest.approx(saved_bytes(job, full), rel=0.01)
    resident, offloaded = job.metrics(full), job.metrics("offloaded")
    for step in range(1, 7):
        for phase in ("generate", "score", "update_prm", "update_policy"):
            name = f"memory/{phase}_device_gib"
            assert offloaded[step][name] < 0.5 * resident[step][name]
        assert offloaded[step]["memory/moved_to_host_gib"] > 0
        assert resident[step]["memory/moved_to_device_gib"] == 0


def test_one_rank_in_bf16_on_a_device_that_is_too_small_for_all(job: Job) -> None:
    alone = [*HALF, *ONE_RANK, "--run.steps=3"]
    config = job.config("half", *alone)
    everything, least = (
        make_plan(config, 1, Machine(2**40, 0, on_gpu=False), table).peak.device
        for table in (RESIDENT, NEEDED)
    )
    limit = (2 * least + everything) / 3
    assert least < 0.8 * limit
    for name, *knobs in (("half", "--memory.offload=never"), ("limited", gib(limit))):
        job.start_alone("train", name, *alone, *knobs)
    assert figures(job, "limited") == figures(job, "half")
    held = [
        value
        for record in job.metrics("limited").values()
        for name, value in record.items()
        if name.endswith("_device_gib") and "moved" not in name
    ]
    assert max(held) * GIB < limit
    assert len({round(value * GIB) for value in held}) > 1, "something leaves"


def test_a_device_that_is_too_small_for_anything_is_refused(job: Job) -> None:
    with pytest.raises(AssertionError, match=r"exit status") as refused:
        job.start("train", 2, "refused", gib(50_000), "--megatron.pipeline_model_parallel_size=1")
    said = str(refused.value)
    assert "DOES NOT FIT" in said
    assert "memory.start_anyway" in said
    assert not (job.run("refused") / "checkpoints").exists()


def gib(nbytes: float) -> str:
    return f"--memory.device_gib={nbytes / GIB!r}"


def saved_bytes(job: Job, name: str) -> int:
    """Of the last checkpoint: tensors that share a slab must not each take the whole slab along."""
    files = (job.run(name) / "checkpoints" / "step_000006").rglob("*")
    return sum(path.stat().st_size for path in files)
