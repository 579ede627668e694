"""The run that all others are compared with."""

from __future__ import annotations

import pytest
from job import Job


@pytest.fixture(scope="session")
def full(job: Job) -> str:
    """The name of an uninterrupted run of six steps: four ranks, TP 2 × PP 2."""
    job.start("train", 4, "full")
    return "full"
