"""Converted checkpoints in real engines, and runs' checkpoints through the tools."""

from __future__ import annotations

import importlib.util
import json
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
from launch import ROOT, run_ranks
from safetensors.torch import load_file

from megatron_prime.weights.convert import to_megatron
from megatron_prime.weights.convert_plan import Options
from megatron_prime.weights.torch_dist import WEIGHTS, DistCheckpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
SAVED = {"tied": "tp2-pp2", "qwen3": "tp1-pp2-vpp2", "untied": "tp2-pp1"}
CASES = Path(__file__).with_name("convert_cases.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    tiny_models.make(folder)
    for i, name in enumerate(tiny_models.CONFIGS):
        options = Options(tp=1 + i % 2, pp=2, workers=2)
        to_megatron(folder / name, folder / "dist" / name, options, lambda *_, **__: None)
    return folder


@pytest.mark.parametrize(("ranks", "layouts"), [pytest.param(1, 1, marks=pytest.mark.slow), (4, 2)])
def test_engines_of_any_layout_load_what_was_converted(
    models: Path, ranks: int, layouts: int
) -> None:
    output = run_ranks(CASES, ranks, ["load", models])
    assert output.count("compared ") == len(tiny_models.CONFIGS) * ranks * layouts


def test_megatron_core_alone_loads_what_was_converted(models: Path) -> None:
    output = run_ranks(CASES, 1, ["plain", models])
    assert output.count("plain Megatron-core loaded ") == 2


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_policy_and_prm_out_of_a_runs_checkpoint(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(CASES, 4, ["save", models, json.dumps(SAVED)])
    convert, inspect = tool("convert_megatron_to_hf"), tool("inspect_checkpoint")
    for name, layout in SAVED.items():
        step = models / "runs" / name / "checkpoints" / "step_000016"
        for model in ("policy", "prm"):
            out = models / f"{name}-{model}"
            arguments = ["--checkpoint", step, "--model", model, "--out", out, "--verify"]
            assert convert.main([*map(str, arguments)]) == 0
            truth = torch.load(models / f"{name}-{model}.pt", weights_only=True)
            found = load_file(out / "model.safetensors")
            assert found.keys() == truth.keys()
            assert all(torch.equal(found[key], truth[key]) for key in truth)
            assert (out / "tokenizer.json").exists()
        capsys.readouterr()
        assert inspect.main([str(step)]) == 0
        shown = capsys.readouterr().out
        parts = [part[2:] for part in layout.split("-") if part[:2] == "tp" or part[:2] == "pp"]
        assert "step 16, policy version 16, saved by 4 ranks" in shown
        assert f"tensor parallel {parts[0]}, pipeline parallel {parts[1]}" in shown
        for model in ("policy", "prm"):
            stored = DistCheckpoint(step / model).tensors
            numbers = sum(prod(t.size) for k, t in stored.items() if k.startswith(WEIGHTS))
            vocab = truth["model.embed_tokens.weight"].shape
            padding = stored["embedding.word_embeddings.weight"].size[0] - vocab[0]
            padding *= vocab[1] * (1 + ("lm_head.weight" in truth))
            assert numbers == sum(t.numel() for t in truth.values()) + padding
        assert shown.count(f"weights {numbers:,} parameters in bfloat16") == 2
        assert "intact" in shown
    victim = next((step / "prm").glob("*.distcp"))
    with victim.open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"?")
    assert inspect.main([str(step)]) == 1
    assert (
        f"prm/{victim.name}: its bytes are not those that were written" in capsys.readouterr().out
    )
