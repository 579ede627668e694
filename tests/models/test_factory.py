"""Which weights a model starts from, and how its batches are cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prime.config import RunConfig
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.models import factory  # noqa: E402


def config(**tables: dict[str, Any]) -> RunConfig:
    given: dict[str, Any] = {
        "run": {"folder": "unused"},
        "model": {"hf": "start", "weights": "converted"},
        "data": {"train": "unused"},
    }
    return RunConfig.model_validate({**given, **tables})


@pytest.mark.parametrize(
    ("name", "hf", "wanted"),
    [
        ("policy", "trained", "converted"),
        ("reference", "trained", "converted"),
        ("prm", None, "converted"),
        ("prm", "trained", "trained"),
        ("prm", "start", "start"),  # said, so meant, though model.hf is called the same
    ],
)
def test_a_checkpoint_of_its_own_goes_before_model_weights(
    monkeypatch: pytest.MonkeyPatch, name: Any, hf: str | None, wanted: str
) -> None:
    read = list[str]()
    monkeypatch.setattr(factory, "load_hf", lambda chunks, hf, shape: read.append(str(hf)))
    monkeypatch.setattr(factory, "load", lambda chunks, source, shape: read.append(str(source)))
    monkeypatch.setattr(factory, "weights_in", lambda weights, _: SimpleNamespace(folder=weights))
    monkeypatch.setattr(factory, "MegatronWeights", lambda folder, shape: folder)
    monkeypatch.setattr(factory, "shape_of", lambda config, name: None)
    factory.start([], config(prm={"hf": hf}), name, None)  # type: ignore[arg-type]
    assert read == [wanted]


def test_the_reference_of_a_stage_is_cut_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run without a PRM it is the policy's KL that asks the reference, so it is cut so."""

    class FakeEngine:
        def __init__(self, chunks: Any, shape: Any, max_tokens: int, temperature: float) -> None:
            self.modules, self.max_tokens = list[Any](), max_tokens

    monkeypatch.setattr(factory, "loaded", lambda config, name: ([], None))
    monkeypatch.setattr(factory, "Engine", FakeEngine)
    given = config(
        advantage={"process_weight": 0.0},
        policy={"micro_batch_tokens": 100},
        prm={"micro_batch_tokens": 200},
        model={"hf": Path("start")},
    )
    assert factory.reference_of(given).engine.max_tokens == 100
    assert factory.reference_of(given, given.prm).engine.max_tokens == 200
