"""The golden file is what its generator computes, and other people's numbers say the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("vectors", FOLDER / "make_prime_vectors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield module


def test_the_golden_file_is_what_the_generator_computes(generator, capsys):
    assert generator.main(["--check"]) == 0, capsys.readouterr().out


def test_check_finds_a_changed_number(generator, tmp_path, capsys):
    content = json.loads((FOLDER / "prime_vectors.json").read_text())
    content["expected"]["ce.grad_logp_phi"][2][3] += 1e-9
    changed = tmp_path / "vectors.json"
    changed.write_text(json.dumps(content))
    assert generator.main(["--check", str(changed)]) == 1
    assert "/ce.grad_logp_phi/2/3" in capsys.readouterr().out


def test_writing_mends_a_changed_file(generator, tmp_path):
    original = (FOLDER / "prime_vectors.json").read_text()
    content = json.loads(original)
    content["expected"] = {}
    changed = tmp_path / "vectors.json"
    changed.write_text(json.dumps(content))
    assert generator.main([str(changed)]) == 0
    assert changed.read_text() == original


def test_the_golden_file_agrees_with_the_shared_vectors(golden, shared):
    for inputs in ("prm", "ref", "old", "new", "outcomes", "values", "mask"):
        assert torch.equal(getattr(golden, inputs), getattr(shared, inputs))
    common = golden._expected.keys() & shared._expected.keys() - {"filter.table"}
    assert len(common) >= 30
    for name in common:
        ours, theirs = golden.raw(name), shared.raw(name)
        for key in ours if isinstance(ours, dict) else [None]:
            a, b = (ours, theirs) if key is None else (ours[key], theirs[key])
            torch.testing.assert_close(
                torch.tensor(a, dtype=torch.float64),
                torch.tensor(b, dtype=torch.float64),
                rtol=0,
                atol=1e-10,
                msg=lambda text, name=name: f"{name}: {text}",
            )
