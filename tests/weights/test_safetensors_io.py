"""Slices of single and sharded checkpoints, damage that is told, and writing that ends whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prime.weights.safetensors_io import HfCheckpoint, WeightsError, write_hf_checkpoint

TENSORS = {name: torch.randn(4, 6) for name in ("a", "b", "c")}
SIZES = dict.fromkeys(TENSORS, (4, 6))
CONFIG = {"config.json": b"{}"}


def write(folder: Path, shard_bytes: int = 10**6) -> HfCheckpoint:
    write_hf_checkpoint(iter(TENSORS.items()), CONFIG, folder, shard_bytes)
    return HfCheckpoint(folder)


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**6, 1), (4 * 24 * 2, 2), (1, 3)])
def test_round_trip_and_slices(shard_bytes: int, files: int, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    checkpoint.check(SIZES)
    found = dict(checkpoint.tensors())
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    part = (slice(1, 3), slice(2, 6))
    assert torch.equal(checkpoint.read("b", part), TENSORS["b"][part])
    assert checkpoint.read("b", (slice(4, 4),)).shape == (0, 6)


def test_index_is_the_one_of_transformers(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 24 * 4
    assert index["weight_map"]["c"] == "model-00003-of-00003.safetensors"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({**SIZES, "d": (1,)}, r"lacks tensors \(1\): d"),
        ({"a": (4, 6), "b": (4, 6)}, r"has unknown tensors \(1\): c"),
        ({**SIZES, "b": (6, 4)}, r"has wrong tensors \(1\): b is \(4, 6\), wanted \(6, 4\)"),
    ],
)
def test_other_tensors_than_the_model_has(
    wanted: dict[str, tuple[int, ...]], told: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=told):
        write(tmp_path).check(wanted)


def test_what_may_be_ignored(tmp_path: Path) -> None:
    write(tmp_path).check({"a": (4, 6), "b": (4, 6)}, may_ignore=["c"])


def test_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"00002.*is damaged or cut short.*copy it again"):
        HfCheckpoint(tmp_path).check(SIZES)


def test_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"00003.*not there"):
        HfCheckpoint(tmp_path).check(SIZES)


def test_index_that_points_to_the_wrong_file(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00003-of", "00001-of"))
    with pytest.raises(WeightsError, match="no tensor c"):
        HfCheckpoint(tmp_path).check(SIZES)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="found neither"):
        HfCheckpoint(tmp_path)


def test_an_export_that_dies_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    write(out)

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(4, 6)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hf_checkpoint(dying(), CONFIG, out)
    assert torch.equal(load_file(out / "model.safetensors")["a"], TENSORS["a"])
    write(out)  # what the dead one left is no hindrance
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_smaller_export_leaves_no_stale_shards_and_nothing_foreign_goes(tmp_path: Path) -> None:
    write(tmp_path / "hf", shard_bytes=1)
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    write(tmp_path / "hf")
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert names == ["config.json", "model.safetensors", "notes.txt"]
