"""What the tests of whole runs share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from job import Job


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Data and a fine-tuned start model, made once."""
    sys.path.append(str(Path(__file__).parent / "end_to_end"))
    from job import make_job

    return make_job(tmp_path_factory.mktemp("job"))
