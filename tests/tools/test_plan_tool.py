"""The planner's command line on a 70B model that exists only as a config.json."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_prime.config_file import load
from megatron_prime.planner.door import machine_of
from megatron_prime.planner.memory import GIB

TOOL = Path(__file__).parents[2] / "tools" / "plan.py"
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA_70B))
    (tmp_path / "train.jsonl").write_text("")
    path = tmp_path / "prime.toml"
    path.write_text(
        f"""
        run.folder = "{tmp_path}/run"
        model.hf = "{tmp_path}/hf"
        data.train = "{tmp_path}/train.jsonl"
        data.template = "plain"
        rollout.engine = "sglang"
        rollout.tensor_parallel_size = 8
        [megatron]
        tensor_model_parallel_size = 8
        pipeline_model_parallel_size = 4
        """
    )
    return path


def gigabytes(output: str, line: str) -> float:
    found = re.search(rf"{line}\s+([\d.]+) GB", output)
    assert found is not None, output
    return float(found[1])


def test_70b_on_64_gpus(tool: ModuleType, config: Path, capsys: pytest.CaptureFixture) -> None:
    """70.55 G parameters in bf16: 141 GB; an eighth is 17.6 GB, a quarter of it the rank's own."""
    assert tool.main(["reshard", str(config), "--ranks", "64"]) == 0
    output = capsys.readouterr().out
    assert "TP 8 × PP 4 × CP 1 × DP 2" in output
    assert "8 SGLang servers of TP 8" in output
    assert gigabytes(output, "whole tensors on every rank would be") == 141
    handed = gigabytes(output, "handed to its engine")
    assert 141.1 / 8 - 0.1 < handed < 1.02 * 141.1 / 8
    assert gigabytes(output, "- its own") == pytest.approx(handed / 4, rel=0.15)  # ends: embeddings
    assert gigabytes(output, "- from other nodes") < 0.85 * handed
    seconds = float(re.search(r"; ([\d.]+) s at 450 GB/s everywhere", output)[1])
    assert 0.75 * handed / 450 * 0.9 < seconds < 2
    between = float(re.search(r"predicted: ([\d.]+) s at 450", output)[1])
    assert handed * 0.75 / 50 * 0.9 < between < 0.5  # stages one after the other would take 1.05 s


def test_one_node_per_replica_needs_no_network(tool, config, capsys) -> None:
    overrides = ["--megatron.pipeline_model_parallel_size=1", "--ranks=16"]
    assert tool.main(["reshard", str(config), *overrides]) == 0
    output = capsys.readouterr().out
    assert gigabytes(output, "- from other nodes") == gigabytes(output, "sent to other nodes") == 0
    assert gigabytes(output, "- its own") == gigabytes(output, "handed to its engine")


def test_the_fewest_ranks_are_the_default(tool, config, capsys) -> None:
    assert tool.main(["reshard", str(config)]) == 0
    assert "× DP 1" in (output := capsys.readouterr().out)
    assert "4 SGLang servers" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks=40"], "--ranks: found 40, wanted a multiple of .* = 32"),
        (["--ranks=96", "--rollout.tensor_parallel_size=5"], "does not divide the run's 96 ranks"),
        (["--ranks=96", "--rollout.tensor_parallel_size=3"], "64 attention heads"),
        (["--rollout.tensor_size=8"], "rollout.tensor_size: no such knob"),
    ],
)
def test_what_cannot_be_planned_is_refused(tool, config, capsys, arguments, message) -> None:
    assert tool.main(["reshard", str(config), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_what_the_run_itself_would_refuse_is_told(tool, config, tmp_path, capsys) -> None:
    (tmp_path / "train.jsonl").unlink()
    assert tool.main(["reshard", str(config), "--ranks", "64"]) == 0
    assert re.search(r"run would be refused:\n  data\.train: ", capsys.readouterr().out)


def test_memory_of_70b_on_64_gpus(tool: ModuleType, config: Path, capsys) -> None:
    """A quarter of an eighth of 70.55 G parameters, in bf16, on a rank in the middle."""
    arguments = ["memory", str(config), "--ranks", "64", "--json"]
    assert tool.main(arguments) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert len(found["ranks"]) == 64
    middle = next(rank for rank in found["ranks"] if rank["pp"] == 1)
    layer = (64 + 2 * 8 + 64) * 128 * 8192 + 3 * 8192 * 28672
    assert middle["parameters"] == 20 * (layer // 8 + 2 * 8192)
    kept = middle["bytes"]
    assert kept["policy.weights"] == pytest.approx(2 * middle["parameters"], rel=1e-4)
    assert kept["policy.gradients"] == 2 * kept["policy.weights"]
    assert kept["policy.moments"] == 2 * kept["policy.masters"]  # halves, over two replicas
    assert kept["policy.masters"] == pytest.approx(2 * middle["parameters"], rel=1e-4)
    assert tool.main([*arguments[:-1], "--offload", "--device-gib=141"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^fits: [\d.]+ GiB in \w+ on rank \d+", output, re.MULTILINE)
    assert "policy.activations" in output


def test_memory_is_planned_without_torch(config: Path) -> None:
    program = f"""
import runpy, sys
sys.argv = ["plan.py", "memory", {str(config)!r}, "--device-gib=1000"]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
finally:
    assert not {{"torch", "megatron", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=TOOL.parents[1])


def test_a_step_in_seconds_and_as_a_picture(tool, config, tmp_path, capsys) -> None:
    png = tmp_path / "step.png"
    arguments = ["step", str(config), "--ranks", "128", "--megatron.sequence_parallel=true"]
    assert tool.main([*arguments, "--json", "--picture", str(png)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert found["fits"]
    seconds = {phase["phase"]: phase["seconds"] for phase in found["phases"]}
    assert seconds["checkpoint"] is seconds["evaluate"] is None
    known = [value for value in seconds.values() if value is not None]
    assert found["step"]["seconds"] == pytest.approx(sum(known))
    assert tool.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"a step: {sum(known):.1f} s" in output
    assert "no GPU has confirmed" in output


def test_rates_and_expectations_are_the_users(tool, config, capsys) -> None:
    def seconds(*options: str) -> dict[str, float]:
        assert tool.main(["step", str(config), "--ranks=128", "--json", *options]) in (0, 2)
        found = json.loads(capsys.readouterr().out)
        return {phase["phase"]: phase["seconds"] for phase in found["phases"]}

    usual, slow = seconds(), seconds("--rate=bf16_tflops=494.5", "--rate=hbm_gb_per_s=1675")
    assert slow["generate"] > 1.7 * usual["generate"]
    assert slow["update_policy"] > 1.5 * usual["update_policy"]
    longer = seconds("--mean-response=2048", "--sampled-per-kept=3.5")
    assert longer["generate"] > 1.9 * usual["generate"]
    assert longer["score"] > 1.6 * usual["score"]
    assert seconds("--cpu") == dict.fromkeys(usual)


def test_layouts_for_128_gpus_within_seconds(tool, config, capsys) -> None:
    began = time.process_time()
    arguments = ["step", str(config), "--search", "--ranks=128", "--top=3"]
    assert tool.main([*arguments, "--json"]) == 0
    assert time.process_time() - began < 30  # 3 s on the machine that this was written on
    found = json.loads(capsys.readouterr().out)
    assert len(found["layouts"]) == 3
    assert 3 < found["fitting"] < found["tried"]
    best = found["layouts"][0]
    options = [f"--{name}={json.dumps(value)}" for name, value in best["options"].items()]
    assert tool.main(["step", str(config), "--ranks=128", "--json", *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["step"]["seconds"] == best["seconds"]
    assert again["peak"]["device_bytes"] == best["device_bytes"]
    assert tool.main(arguments) == 0
    output = capsys.readouterr().out
    assert "megatron.tensor_model_parallel_size = 8" in output
    assert tool.main(["step", str(config), "--search"]) == 1


def test_a_search_without_a_layout_that_fits(tool, config, capsys) -> None:
    arguments = ["step", str(config), "--search", "--ranks=8", "--device-gib=20"]
    assert tool.main([*arguments, "--sglang.max_total_tokens=4096"]) == 2
    assert re.search(r"^none of \d+ layouts fits", capsys.readouterr().out)
    assert tool.main(arguments) == 1
    assert re.search(r"^none of \d+ .*mem_fraction_static: found", capsys.readouterr().err)


def test_servers_without_room_are_refused_with_what_helps(tool, config, capsys) -> None:
    arguments = ["step", str(config), "--ranks=64", "--rollout.tensor_parallel_size=4"]
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert "sglang.mem_fraction_static: found 0.4 of the 72.5 GiB" in error  # 79 - 6 - 0.5
    assert re.search(r"^  rollout\.tensor_parallel_size = 8: [\d.]+ GiB", error, re.MULTILINE)


@pytest.mark.parametrize("options", [[], ["--memory.device_gib=60"], ["--memory.device_gib=200"]])
def test_the_device_is_that_of_the_door(tool, config, capsys, options) -> None:
    """Of a run on H100s, whose torch reports 79 GiB; `--device-gib` is another device."""
    arguments = ["step", str(config), "--ranks=128", "--json", *options]
    assert tool.main(arguments) in (0, 2)
    machine = machine_of(load(config, options), 79 * GIB, on_gpu=True)
    assert json.loads(capsys.readouterr().out)["device_bytes"] == machine.device_bytes
    assert tool.main([*arguments, "--device-gib=141"]) == 0
    assert json.loads(capsys.readouterr().out)["device_bytes"] == 141 * GIB
