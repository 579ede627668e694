"""tools/compare_logprobs.py with a real server: one with the same weights, and one without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_server import KEY, logprobs_of

from megatron_prime.weights.convert import to_megatron
from megatron_prime.weights.convert_plan import Options

ROOT = Path(__file__).parents[2]
TOKENS = [5, 1, 7, 7, 30, 2, 11]
EACH = """
import json, runpy, sys
tool = runpy.run_path(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    print("status", tool["main"](arguments), "end", flush=True)
"""


def converted(model, folder: Path) -> list[str]:
    """What the tool is told of a model."""
    model.save_pretrained(folder / "hf")
    to_megatron(folder / "hf", folder / "dist", Options(), lambda *_, **__: None)
    return ["--hf", str(folder / "hf"), "--checkpoint", str(folder / "dist")]


def test_the_server_has_a_column_and_is_found_out(tmp_path: Path, server, model) -> None:
    other = type(model[0])(model[0].config).float().eval()
    other.load_state_dict(model[0].state_dict())
    with torch.no_grad():
        other.model.norm.weight.mul_(3.0)
    more = ["--server", server.url, "--tokens", ",".join(map(str, TOKENS))]
    same = [*converted(model[0], tmp_path / "same"), *more, "--server-tolerance", "1e-3"]
    calls = [same, [*converted(other, tmp_path / "other"), *more]]
    done = subprocess.run(
        [sys.executable, "-c", EACH, str(ROOT / "tools/compare_logprobs.py"), json.dumps(calls)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SGLANG_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    agree, part, _ = done.stdout.split("end\n")
    assert agree.endswith("status 0 "), agree
    rows = re.findall(r"^ +\d+ +\d+ +-\S+ +-\S+ +\S+ +(-\S+) +\S+ *$", agree, re.M)
    told = logprobs_of(model[0], TOKENS[:1], tuple(TOKENS[1:]))
    assert [float(row) for row in rows] == pytest.approx(told, abs=2e-4)
    assert part.endswith("status 2 "), part
    assert "all layers agree" in part
    assert "the server parts by more than 0.1 nats" in part
