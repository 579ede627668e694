"""Models and weights on several gloo ranks; the cases themselves are in megatron_cases.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from launch import run_ranks
from layouts import LAYOUTS, OF_EIGHT
from matrix import cases, in_turn, selected

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

MODELS = list(tiny_models.CONFIGS)
EXPORTED = ["tp1-pp1", "tp2-pp2", "tp1-pp2-vpp2"]


def named(kind: str, models: Sequence[str], layouts: Sequence[str]) -> list[Any]:
    """Cases of megatron_cases.py as parameters of tests."""
    return [
        pytest.param("-".join((kind, *case.values[0])), id=f"{kind}-{case.id}", marks=case.marks)
        for case in cases(models, in_turn(models, layouts), layouts)
    ]


CASES = [
    *(f"vocab_parallel-tp{tp}" for tp in (1, 2, 4)),
    "gather_groups",
    "tally",
    *named("logprobs", MODELS, [*LAYOUTS]),
    *named("round_trip", MODELS, [*LAYOUTS]),
    *named("copies", ["tied", "untied"], [*LAYOUTS]),
    *named("export", MODELS, EXPORTED),
    *named("sequence_parallel", MODELS, [layout for layout in LAYOUTS if layout[:3] == "tp2"]),
]
CASES_OF_EIGHT = [
    *(
        "-".join(c)
        for c in product(["logprobs", "round_trip", "sequence_parallel"], MODELS, OF_EIGHT)
    ),
    *("-".join(c) for c in product(["copies"], ["tied", "untied"], OF_EIGHT)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_models.make(path)
    return path


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest, folder: Path) -> dict[str, str | None]:
    """The error of each case that a test asks for, or None."""
    return run_cases(folder, 4, selected(request))


def run_cases(folder: Path, nproc: int, wanted: Iterable[str]) -> dict[str, str | None]:
    (folder / "cases.json").write_text(json.dumps([*wanted]))
    output = run_ranks(Path(__file__).with_name("megatron_cases.py"), nproc, [folder], 500)
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    assert results, output
    return {result["case"]: result["error"] for result in results}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, errors: dict[str, str | None]) -> None:
    assert errors[case] is None, errors[case]


def test_no_case_is_forgotten(
    request: pytest.FixtureRequest, folder: Path, errors: dict[str, str | None]
) -> None:
    """Neither of those that run now, nor of those that could."""
    assert sorted(errors) == sorted(selected(request))
    names = [case if isinstance(case, str) else case.values[0] for case in CASES]
    assert sorted(json.loads((folder / "offered.json").read_text())) == sorted(names)


@pytest.mark.slow
def test_eight_ranks(folder: Path) -> None:
    found = run_cases(folder, 8, CASES_OF_EIGHT)
    assert sorted(found) == sorted(CASES_OF_EIGHT)
    assert not {case: error for case, error in found.items() if error}


@pytest.mark.parametrize("case", named("export", MODELS, EXPORTED))
def test_transformers_reads_the_export(
    case: str, folder: Path, errors: dict[str, str | None]
) -> None:
    from transformers import AutoModelForCausalLM

    assert errors[case] is None
    _, name, layout = case.split("-", 2)
    model = AutoModelForCausalLM.from_pretrained(
        folder / f"{name}-{layout}", attn_implementation="eager"
    )
    truth = torch.load(folder / f"{name}.pt")
    found = tiny_models.truth_of(model, truth["sequences"])
    assert torch.equal(found["logprobs"], truth["logprobs"])
    assert (folder / f"{name}-{layout}" / "tokenizer.json").read_text() == "{}"
