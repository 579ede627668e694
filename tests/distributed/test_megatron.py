"""Models and weights on several gloo ranks; the cases themselves are in megatron_cases.py."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
from launch import run_ranks
from layouts import LAYOUTS, OF_EIGHT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

MODELS = list(tiny_models.CONFIGS)
EXPORTED = ["tp1-pp1", "tp2-pp2", "tp1-pp2-vpp2"]
CASES = [
    *(f"vocab_parallel-tp{tp}" for tp in (1, 2, 4)),
    "gather_groups",
    "tally",
    *("-".join(c) for c in product(["logprobs", "round_trip"], MODELS, LAYOUTS)),
    *("-".join(c) for c in product(["copies"], ["tied", "untied"], LAYOUTS)),
    *("-".join(c) for c in product(["export"], MODELS, EXPORTED)),
    *(
        "-".join(c)
        for c in product(["sequence_parallel"], MODELS, [x for x in LAYOUTS if x[:3] == "tp2"])
    ),
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
def errors(folder: Path) -> dict[str, str | None]:
    """Each case's error, or None."""
    return run_cases(folder, 4)


def run_cases(folder: Path, nproc: int) -> dict[str, str | None]:
    output = run_ranks(Path(__file__).with_name("megatron_cases.py"), nproc, [folder], 500)
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    assert results, output
    return {result["case"]: result["error"] for result in results}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, errors: dict[str, str | None]) -> None:
    assert errors[case] is None, errors[case]


def test_no_case_is_forgotten(errors: dict[str, str | None]) -> None:
    assert sorted(errors) == sorted(CASES)


@pytest.mark.slow
def test_eight_ranks(folder: Path) -> None:
    found = run_cases(folder, 8)
    assert sorted(found) == sorted(CASES_OF_EIGHT)
    assert not {case: error for case, error in found.items() if error}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", EXPORTED)
def test_transformers_reads_the_export(
    name: str, layout: str, folder: Path, errors: dict[str, str | None]
) -> None:
    from transformers import AutoModelForCausalLM

    assert errors[f"export-{name}-{layout}"] is None
    model = AutoModelForCausalLM.from_pretrained(
        folder / f"{name}-{layout}", attn_implementation="eager"
    )
    truth = torch.load(folder / f"{name}.pt")
    found = tiny_models.truth_of(model, truth["sequences"])
    assert torch.equal(found["logprobs"], truth["logprobs"])
    assert (folder / f"{name}-{layout}" / "tokenizer.json").read_text() == "{}"
