"""The command line of tools/scaling.py; what it prints of 70B is held by test_scaling_page.py."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
CONFIG = """
run.folder = "r"
data.train = "t"
policy.mini_batch_size = 256
rollout = {{engine = "sglang", tensor_parallel_size = 2, prompts_per_step = 128}}
megatron = {{tensor_model_parallel_size = 2, pipeline_model_parallel_size = {stages}}}
model.hf = "{hf}"
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tool", ROOT / "tools/scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(folder: Path, stages: int) -> str:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    path = folder / "prime.toml"
    path.write_text(CONFIG.format(stages=stages, hf=folder))
    return str(path)


def test_limits_add_up_and_say_what_has_no_plan(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["limits", config(tmp_path, 2), "--ranks", "8"]) == 0
    said = capsys.readouterr().out
    sums = [float(cell) for cell in re.findall(r"^a step +(.*)$", said, re.M)[0].split()]
    assert sum(sums[:-1]) == pytest.approx(sums[-1], abs=0.01 * len(sums))
    phases = re.findall(r"^(?:generate|score|update_\w+|sync_weights) .* ([\d.]+)$", said, re.M)
    assert sum(map(float, phases)) == pytest.approx(sums[-1], abs=0.03)
    base, faster = (
        float(re.findall(rf"^{what} +([\d.]+)", said, re.M)[0])
        for what in ("nothing of it", r"65 % of the peak achieved, not 55 %")
    )
    assert faster < base == pytest.approx(sums[-1], abs=0.06)


def test_without_a_pipeline_nothing_waits(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["pipeline", config(tmp_path, 1), "--ranks", "8"]) == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert len(rows) == 1
    assert re.findall(r"(\d+\.\d)%", rows[0]) == ["0.0"] * 3


@pytest.mark.parametrize("what", ["limits", "pipeline", "generation", "exchanges"])
def test_ranks_that_hold_no_whole_replica(
    tool: ModuleType, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([what, config(tmp_path, 2), "--ranks", "6"]) == 1
    assert "--ranks: found 6, wanted a multiple of" in capsys.readouterr().err


def test_rows_that_no_pack_can_hold(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "--policy.micro_batch_tokens=300"
    assert tool.main(["pipeline", config(tmp_path, 2), "--ranks", "8", short]) == 1
    assert "raise micro_batch_tokens" in capsys.readouterr().err
