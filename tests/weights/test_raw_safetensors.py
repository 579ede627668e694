"""Tables of safetensors files: damage is told by name, never by a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prime.errors import WeightsError
from megatron_prime.weights.raw_safetensors import Stored, files_of, read_table, table_of

A = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}


def file_with(path: Path, table: Any, nbytes: int) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    return path


def test_a_table_by_value(tmp_path: Path) -> None:
    path = file_with(tmp_path / "x", {"b": B, "a": A, "__metadata__": {}}, 20)
    base = path.stat().st_size - 20
    wanted = {"a": Stored("bfloat16", (2, 3), base), "b": Stored("float32", (2,), base + 12)}
    assert read_table(path) == wanted
    path.write_bytes(table_of([("a", "bfloat16", (2, 3)), ("b", "float32", (2,))]) + bytes(20))
    assert [s.start - path.stat().st_size + 20 for s in read_table(path).values()] == [0, 12]


@pytest.mark.parametrize(
    ("table", "nbytes", "told"),
    [
        ({"a": A, "b": B | {"data_offsets": [10, 18]}}, 18, "b of .* lies at 10 to 18, wanted 12"),
        ({"a": A, "b": B | {"data_offsets": [14, 22]}}, 22, "b of .* lies at 14 to 22, wanted 12"),
        ({"a": A | {"shape": [2, 4]}}, 12, "lies at 0 to 12, wanted 0 to 16"),
        ({"a": {"dtype": "BF16", "shape": [2, 3]}}, 12, "KeyError"),
        ({"a": 3}, 12, "TypeError"),
        ([1], 12, "damaged"),
        (b"{", 0, "damaged"),
        ({"a": A}, 11, "cut short"),
        ({"a": A | {"dtype": "F64"}}, 12, "a is F64, wanted one of"),
    ],
)
def test_damage(tmp_path: Path, table: Any, nbytes: int, told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        read_table(file_with(tmp_path / "x", table, nbytes))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json is damaged or no index"):
        files_of(tmp_path)
