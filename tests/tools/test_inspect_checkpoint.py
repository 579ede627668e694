"""What is said of Hugging Face and converted directories; runs' are in test_converted.py."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "weights"))

import synthetic  # noqa: E402

from megatron_prime.weights.convert import to_megatron  # noqa: E402
from megatron_prime.weights.convert_plan import Options  # noqa: E402

PARAMETERS = 3 * (32 * (32 + 2 * 16 + 32) + 3 * 32 * 48 + 2 * 32) + 2 * 50 * 32 + 32


@pytest.fixture(scope="module")
def inspect() -> ModuleType:
    path = ROOT / "tools" / "inspect_checkpoint.py"
    spec = importlib.util.spec_from_file_location("inspect_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_hugging_face_directory(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = synthetic.make(tmp_path / "hf", synthetic.SMALL, files=2)
    assert inspect.main([str(hf)]) == 0
    shown = capsys.readouterr().out
    assert "llama: 3 layers, hidden 32, 4 heads (2 key/value), vocabulary 50" in shown
    assert f"weights {PARAMETERS:,} parameters in bfloat16" in shown
    assert "30 tensors in 2 files" in shown
    assert "a Hugging Face directory has no checksums" in shown
    file = hf / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert inspect.main([str(hf)]) == 1
    assert f"DAMAGED: {file} is damaged or cut short" in capsys.readouterr().out


def test_a_converted_checkpoint(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, dist = synthetic.make(tmp_path / "hf", synthetic.SMALL), tmp_path / "dist"
    to_megatron(hf, dist, Options(tp=2, pp=3), lambda *_, **__: None)
    assert inspect.main([str(dist)]) == 0
    shown = capsys.readouterr().out
    assert f"converted from {hf}" in shown
    assert "cut for tensor parallel 2, pipeline parallel 3" in shown
    padding = 2 * (64 - 50) * 32
    assert f"weights {PARAMETERS + padding:,} parameters in bfloat16" in shown
    assert "intact" in shown
    with (dist / "__1_0.distcp").open("r+b") as file:
        file.write(b"??")
    assert inspect.main([str(dist)]) == 1
    assert "DAMAGED: __1_0.distcp: its bytes are not those" in capsys.readouterr().out


def test_nothing_known(
    tmp_path: Path, inspect: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main([str(tmp_path)]) == 1
    assert "found no config.json (Hugging Face)" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "absent")]) == 1
    assert "is no directory" in capsys.readouterr().err
