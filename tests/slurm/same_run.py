"""Whether two runs are the same to the last bit."""

from __future__ import annotations

from job import Job, reproducible


def assert_same(job: Job, undisturbed: str, name: str) -> None:
    """Figures of all steps and every byte of the exported weights."""
    wanted, found = job.metrics(undisturbed), job.metrics(name)
    assert list(found) == list(wanted)
    for step in wanted:
        assert reproducible(found[step]) == reproducible(wanted[step]), f"step {step}"
    weights = [path.name for path in (job.run(undisturbed) / "hf").glob("*.safetensors")]
    assert weights
    for file in weights:
        parts = (job.run(run) / "hf" / file for run in (undisturbed, name))
        assert len({part.read_bytes() for part in parts}) == 1, file
