"""The table of a distributed checkpoint against torch's own classes, and what damages it."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prime.errors import WeightsError
from megatron_prime.weights import dist_metadata
from megatron_prime.weights.dist_metadata import Piece, StoredTensor

PIECES = [
    ("f", Piece("a", (0, 0), (2, 3), 0, 700)),
    ("f", Piece("a", (2, 0), (2, 3), 700, 70000)),
    ("g", Piece("s", None, (), 5, 2**40)),
]


def of_torch() -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size((2, 3))) for at in ((0, 0), (2, 0))]
    properties = TensorProperties(torch.bfloat16)
    return Metadata(
        {
            "a": TensorStorageMetadata(properties, torch.Size((4, 3)), chunks),
            "s": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("a", torch.Size((0, 0))): _StorageInfo("f", 0, 700),
            MetadataIndex("a", torch.Size((2, 0))): _StorageInfo("f", 700, 70000),
            MetadataIndex("s"): _StorageInfo("g", 5, 2**40),
        },
    )


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    dist_metadata.write(tmp_path, PIECES, {"a": ((4, 3), "bfloat16")})
    found, wanted = FileSystemReader(tmp_path).read_metadata(), of_torch()
    assert found.state_dict_metadata == wanted.state_dict_metadata
    assert found.storage_data == wanted.storage_data
    assert type(found.state_dict_metadata["a"].size) is torch.Size


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(of_torch()))
    table = dist_metadata.read(tmp_path)
    assert table.tensors == {"a": StoredTensor("bfloat16", (4, 3), PIECES[:2])}
    assert table.ends == {"f": 70700, "g": 2**40 + 5}


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("1 / 0",)


def test_what_a_table_names_is_not_run(tmp_path: Path) -> None:
    metadata = of_torch()
    metadata.planner_data = Harmful()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(WeightsError, match=r"damaged .*it names builtins\.eval"):
        dist_metadata.read(tmp_path)


def test_whatever_byte_changes_no_traceback_follows(tmp_path: Path) -> None:
    whole, chance = pickle.dumps(of_torch()), random.Random(0)
    refused = 0
    for _ in range(600):
        spoiled = bytearray(whole)
        spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
        (tmp_path / ".metadata").write_bytes(spoiled[: chance.choice([None, 300])])
        try:
            dist_metadata.read(tmp_path)
        except WeightsError:
            refused += 1
    assert refused > 300
