"""The golden vectors as float64 tensors, and garbage for padding.

Tests that take `vectors` run on the repository's own vectors and, where they lie beside the
checkout, on ones that another program computed; those that take `golden` run on our own alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "prime_vectors.json"
SHARED = Path(__file__).parents[3] / "shared" / "prototypes" / "prime_vectors" / "vectors.json"


class Vectors:
    """Inputs as tensors; `vectors[name]` is the expected value of that name."""

    def __init__(self, path):
        content = json.loads(path.read_text())
        inputs = content["inputs"]
        self.prm, self.ref, self.old, self.new, self.outcomes, self.values = (
            torch.tensor(inputs[key], dtype=torch.float64)
            for key in ("logp_phi", "logp_ref", "old_logp", "new_logp", "acc", "values")
        )
        self.mask = torch.tensor(inputs["mask"]).bool()
        self.group_size, self.beta = inputs["K"], inputs["beta"]
        self._expected = content["expected"]

    def raw(self, name):
        value = self._expected[name]
        return value["value"] if isinstance(value, dict) and "value" in value else value

    def __getitem__(self, name):
        return torch.tensor(self.raw(name), dtype=torch.float64)


@pytest.fixture(scope="session")
def golden():
    return Vectors(GOLDEN)


@pytest.fixture(scope="session")
def shared():
    if not SHARED.exists():
        pytest.skip(f"the project's shared vectors are not beside this checkout ({SHARED})")
    return Vectors(SHARED)


@pytest.fixture(params=["golden", "shared"])
def vectors(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[float("nan"), float("inf"), -float("inf"), 1e30])
def spoil(request):
    """Put garbage on padding."""
    return lambda values, mask: torch.where(mask, values, request.param)


@pytest.fixture
def widen():
    """Append columns of padding."""

    def append(values, columns=3):
        filler = False if values.dtype == torch.bool else 7.75
        return torch.cat([values, values.new_full((len(values), columns), filler)], dim=1)

    return append
