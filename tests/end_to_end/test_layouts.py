"""A run that changes its layout at every resume: context-parallel, interleaved, then one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from job import Job, layout, load_quickstart, write_shape

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

CONTEXT = (
    "--megatron.tensor_model_parallel_size=2",
    "--megatron.pipeline_model_parallel_size=1",
    "--megatron.context_parallel_size=2",
    "--megatron.sequence_parallel=true",
)
VIRTUAL = (
    "--megatron.tensor_model_parallel_size=1",
    "--megatron.pipeline_model_parallel_size=2",
    "--megatron.virtual_pipeline_model_parallel_size=2",
)


@pytest.fixture(scope="module")
def deep(job: Job) -> tuple[str, ...]:
    """The knobs that start from a model of four layers, which two stages can hold in two parts,
    and of 67 tokens, which are padded to 80 on one and to 96 on two tensor-parallel ranks."""
    folder = job.folder / "deep"
    write_shape(load_quickstart(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 4, "vocab_size": 67})
    )
    start = job.folder / "deep_start"
    knobs = (f"--model.hf={folder}", f"--sft.output={start}", *VIRTUAL)
    job.start("sft", 2, "deep_sft", *knobs)
    return (f"--model.hf={start}", "--evaluate.max_prompts=4", "--checkpoint.every=1")


def test_a_run_goes_on_in_any_layout(job: Job, deep: tuple[str, ...]) -> None:
    alone = layout(tp=1, pp=1)
    job.start_alone("train", "straight", *deep, *alone, "--run.steps=3")
    job.start("train", 4, "changing", *deep, *CONTEXT, "--run.steps=1")
    job.start("train", 4, "changing", *deep, *VIRTUAL, "--run.steps=2")
    job.start_alone("train", "changing", *deep, *alone, "--run.steps=3")
    straight, changing = job.metrics("straight"), job.metrics("changing")
    assert list(changing) == list(straight) == [0, 1, 2, 3]
    for step in (1, 2, 3):
        for name in ("prm/loss", "policy/loss", "policy/grad_norm", "prm/grad_norm"):
            assert changing[step][name] == pytest.approx(straight[step][name], rel=2e-3, abs=1e-5)
        assert changing[step]["rollout/mismatch_max"] < 1e-4
    assert Path(job.run("changing") / "hf" / "config.json").exists()
