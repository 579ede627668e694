"""transformers against Megatron: equal weights agree; a changed layer is found."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prime.weights.convert import to_megatron
from megatron_prime.weights.convert_plan import Options

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TOKENS = "5,1,7,7,30,2,11"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("compare") / "hf"
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


EACH = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tool", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
for arguments in json.loads(sys.argv[2]):
    print("status", tool.main(arguments), "end", flush=True)
"""


def compare(hf: Path, *converted: Path) -> list[str]:
    """What the tool says of each, with its exit status; in one process, for imports take long."""
    tool = ROOT / "tools" / "compare_logprobs.py"
    calls = [["--hf", str(hf), "--checkpoint", str(c), "--tokens", TOKENS] for c in converted]
    done = subprocess.run(
        [sys.executable, "-c", EACH, str(tool), json.dumps(calls)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("end\n")[:-1]


def changed(hf: Path, out: Path, name: str) -> Path:
    """A converted checkpoint of `hf` with another tensor `name`."""
    shutil.copytree(hf, out / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, out / "hf" / "model.safetensors", metadata={"format": "pt"})
    to_megatron(out / "hf", out / "dist", Options(), lambda *_, **__: None)
    return out / "dist"


def test_equal_weights_agree(tmp_path: Path, hf: Path) -> None:
    to_megatron(hf, tmp_path / "dist", Options(tp=2), lambda *_, **__: None)
    (found,) = compare(hf, tmp_path / "dist")
    assert found.endswith("status 0 ")
    assert "all layers agree to 0.0001" in found
    rows = re.findall(r"^ +(\d+) +(\d+) +(-\S+) +(-\S+) +(\S+)", found, re.M)
    assert [int(row[1]) for row in rows] == [int(token) for token in TOKENS.split(",")[1:]]
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[int(token) for token in TOKENS.split(",")]])
    with torch.no_grad():
        logp = AutoModelForCausalLM.from_pretrained(hf)(tokens).logits[0].log_softmax(-1)
    for i, row in enumerate(rows):
        assert float(row[3]) == pytest.approx(float(logp[i, tokens[0, i + 1]]), abs=1e-5)


PARTING = {
    "model.layers.2.self_attn.q_norm.weight": "part first at: layer 2",
    "model.embed_tokens.weight": "part first at: embedding",
    "model.norm.weight": "part first at: final norm",
    "lm_head.weight": "hidden states agree: the output layer",
}


def test_the_first_layer_that_differs_is_named(tmp_path: Path, hf: Path) -> None:
    converted = [changed(hf, tmp_path / name, name) for name in PARTING]
    for found, where in zip(compare(hf, *converted), PARTING.values(), strict=True):
        assert found.endswith("status 2 ")
        assert where in found


def test_what_does_not_fit_is_told(
    tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model being built: neither library would name the file or the tensor."""
    tool = runpy.run_path(str(ROOT / "tools" / "compare_logprobs.py"))["main"]
    dist, other = tmp_path / "dist", tmp_path / "other"
    to_megatron(hf, dist, Options(), lambda *_, **__: None)
    shutil.copytree(hf, other)
    tensors = load_file(hf / "model.safetensors")

    def said(folder: Path, tokens: str = TOKENS) -> str:
        arguments = ["--hf", str(folder), "--checkpoint", str(dist), "--tokens", tokens]
        assert tool(arguments) == 1
        return capsys.readouterr().err

    assert "found token 37, wanted 0 to 36" in said(hf, "1,2,37")
    assert "found token -1, wanted 0 to 36" in said(hf, "1,-1")
    save_file({k: t for k, t in tensors.items() if "q_norm" not in k}, other / "model.safetensors")
    assert "lacks tensors (4): model.layers.0.self_attn.q_norm.weight" in said(other)
    config = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    fewer = {k: t for k, t in tensors.items() if "layers.3" not in k}
    save_file(fewer, other / "model.safetensors")
    assert "is (4, 32), wanted (3, 32)" in said(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_states_of_a_gpu_are_compared_on_the_cpu() -> None:
    from megatron_prime.models.side_by_side import Run, _watch, differences

    layers = [torch.nn.Linear(4, 4, device="cuda") for _ in range(3)]
    states = _watch(layers[0], layers[1:2], layers[2])
    for layer in layers:
        layer(torch.ones(2, 4, device="cuda"))
    run = Run(torch.zeros(1), states)
    there = Run(torch.zeros(1), {name: state.clone() for name, state in states.items()})
    assert differences(run, there) == {"embedding": 0, "layer 0": 0, "final norm": 0}
    assert {state.device.type for state in states.values()} == {"cpu"}
