"""Models and weights on four gloo ranks; the cases themselves are in megatron_cases.py."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
from launch import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LAYOUTS = ["tp1-pp1", "tp2-pp1", "tp1-pp2", "tp2-pp2"]
MODELS = list(tiny_models.CONFIGS)
CASES = [
    *(f"vocab_parallel-tp{tp}" for tp in (1, 2, 4)),
    "gather_groups",
    *(
        "-".join(c)
        for c in product(["logprobs", "round_trip", "copies", "export"], MODELS, LAYOUTS)
    ),
    *("-".join(c) for c in product(["sequence_parallel"], MODELS, ["tp2-pp1", "tp2-pp2"])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_models.make(path)
    return path


@pytest.fixture(scope="module")
def errors(folder: Path) -> dict[str, str | None]:
    """Each case's error, or None."""
    output = run_ranks(Path(__file__).with_name("megatron_cases.py"), 4, [folder], timeout_s=400)
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    assert results, output
    return {result["case"]: result["error"] for result in results}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, errors: dict[str, str | None]) -> None:
    assert errors[case] is None, errors[case]


def test_no_case_is_forgotten(errors: dict[str, str | None]) -> None:
    assert sorted(errors) == sorted(CASES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2"])
def test_transformers_reads_the_export(
    name: str, layout: str, folder: Path, errors: dict[str, str | None]
) -> None:
    from transformers import Qwen2ForCausalLM

    assert errors[f"export-{name}-{layout}"] is None
    model = Qwen2ForCausalLM.from_pretrained(folder / f"{name}-{layout}")
    truth = torch.load(folder / f"{name}.pt")
    with torch.no_grad():
        logp_V = model(truth["tokens"]).logits[:, :-1].log_softmax(-1)
    found = logp_V.gather(-1, truth["tokens"][:, 1:, None]).squeeze(-1)
    assert torch.equal(found, truth["logprobs"])
    assert (folder / f"{name}-{layout}" / "tokenizer.json").read_text() == "{}"
