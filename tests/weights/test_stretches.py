"""Stretches of tensors by value; and the memory that a conversion takes, for wide layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import synthetic

from megatron_prime.weights import stretches
from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.stretches import Budget, Extent, FileTensor, opened

ROOT = Path(__file__).parents[2]
MIB = 2**20
# Two layers like those of Llama-2-70B, at three eighths of their widths: a fused gate and up is
# larger than the embedding, and down_proj, which --tp cuts by columns, is the largest of all.
WIDE = synthetic.SMALL | {
    "hidden_size": 3072,
    "intermediate_size": 10752,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 8000,
}
MAIN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
print([line for line in open("/proc/self/status") if "VmHWM" in line][0])
"""


@pytest.fixture
def tensor(tmp_path: Path) -> FileTensor:
    """Six rows of four numbers of two bytes: rows 0 to 3 in one file, 4 and 5 in columns."""
    (tmp_path / "a").write_bytes(b"??" + bytes(range(32)))
    (tmp_path / "b").write_bytes(bytes([32, 33, 34, 35, 40, 41, 42, 43]))
    (tmp_path / "c").write_bytes(bytes([36, 37, 38, 39, 44, 45, 46, 47]))
    extents = (
        Extent(0, 4, 0, 4, tmp_path / "a", 2),
        Extent(4, 2, 0, 2, tmp_path / "b", 0),
        Extent(4, 2, 2, 2, tmp_path / "c", 0),
    )
    return FileTensor("bfloat16", 6, 4, extents)


@pytest.mark.parametrize("block", [1 << 18, 8, 10])
def test_rows_and_columns_by_value(
    tensor: FileTensor, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "BLOCK", block)
    with opened(tensor, False, Budget(100)) as whole:
        assert b"".join(map(bytes, whole.blocks(0, 6))) == bytes(range(48))
        assert b"".join(map(bytes, whole.blocks(3, 2, 1, 2))) == bytes(
            [*range(26, 30), *range(34, 38)]
        )
    above = FileTensor("bfloat16", 4, 4, tensor.extents[:1])
    with opened(above, False, Budget(0)) as streamed:  # needs none of the budget
        assert b"".join(map(bytes, streamed.blocks(1, 2))) == bytes(range(8, 24))


# What Python takes. With 512 MiB a whole layer of this model would go unnoticed.
SLACK = 128 * MIB


@pytest.mark.long
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_memory_is_bounded_by_the_largest_hugging_face_tensor(
    tmp_path: Path, dtype: str | None
) -> None:
    """2 x 63 MiB and what Python takes; with torch, for another type of numbers, its 300 MiB."""
    hf = synthetic.make(tmp_path / "hf", WIDE, sparse=True)
    largest = max(prod(size) for size in hf_shapes(ModelShape.from_hf(hf)).values()) * 2
    assert largest == 10752 * 3072 * 2
    change = ["--dtype", dtype] if dtype else []
    bound = 2 * largest + (512 * MIB if dtype else SLACK)
    to, back = tmp_path / "dist", tmp_path / "back"
    for tp in ("8", "1"):
        for name, arguments in (
            ("hf_to_megatron", ["--hf", hf, "--out", to / tp, "--tp", tp, *change]),
            ("megatron_to_hf", ["--checkpoint", to / tp, "--out", back / tp]),
        ):
            command = [
                ROOT / "tools" / f"convert_{name}.py",
                *arguments,
                "--workers",
                4,
                "--verify",
            ]
            done = subprocess.run(
                [sys.executable, "-c", MAIN, *map(str, command)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=250,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
            assert peak <= bound, (name, tp, json.dumps(peak / MIB))
        if dtype:
            break
