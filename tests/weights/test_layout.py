"""The interleaving by hand, and bit-exact round trips over random shapes and splits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_prime.weights.layout import Layout, fuse, join, part_of, row_runs, unfuse
from megatron_prime.weights.names import Entry, entries, hf_shapes
from megatron_prime.weights.shape import ModelShape, padded

SHAPE = ModelShape("qwen2", 24, 1, 4, 2, 2, 8, 5, 16, 64, 1e-6, 1e4, True, False)


def shards_of(entry: Entry, whole: dict[str, Tensor], shape: ModelShape, tp: int) -> list[Tensor]:
    return [
        fuse(
            entry.layout,
            [
                whole[name][part_of(entry.layout, whole[name].shape, shape, tp, rank)]
                for name in entry.hf
            ],
            shape,
            tp,
        )
        for rank in range(tp)
    ]


def test_qkv_lies_group_by_group() -> None:
    # head_dim 2, four query heads in two groups; rows numbered, q from 0, k from 100, v from 200
    q, k, v = torch.arange(8), 100 + torch.arange(4), 200 + torch.arange(4)
    fused = fuse(Layout.QKV, [q, k, v], SHAPE, tp=1)
    assert fused.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    shards = shards_of(
        Entry("", ("q", "k", "v"), Layout.QKV), {"q": q, "k": k, "v": v}, SHAPE, tp=2
    )
    assert torch.equal(torch.cat(shards), fused)


def test_gate_up_is_fused_per_rank() -> None:
    gate, up = torch.arange(4), 100 + torch.arange(4)
    shards = shards_of(Entry("", ("g", "u"), Layout.GATE_UP), {"g": gate, "u": up}, SHAPE, tp=2)
    assert [shard.tolist() for shard in shards] == [[0, 1, 100, 101], [2, 3, 102, 103]]


def test_vocabulary_is_padded_with_zeros_even_where_a_rank_has_no_token() -> None:
    shape = replace(SHAPE, padded_vocab_size=padded(5, 4))
    whole = {"e": torch.ones(5, 3)}
    shards = shards_of(Entry("", ("e",), Layout.VOCAB), whole, shape, tp=4)
    assert [shard.shape for shard in shards] == [(16, 3)] * 4
    assert [int(shard.sum()) for shard in shards] == [15, 0, 0, 0]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_round_trip_is_bit_exact(seed: int, tp: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    kv_heads = 4 * pick(1, 3)
    vocab = pick(3, 90)
    shape = replace(
        SHAPE,
        hidden_size=pick(1, 9),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * pick(1, 5),
        head_dim=pick(1, 5),
        ffn_size=4 * pick(1, 6),
        vocab_size=vocab,
        padded_vocab_size=padded(vocab, tp),
    )
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    whole = {
        name: torch.randn(size, generator=generator).to(dtype)
        for name, size in hf_shapes(shape).items()
    }
    for entry in entries(shape):
        shards = shards_of(entry, whole, shape, tp)
        assert len({shard.shape for shard in shards}) == 1
        parts = [unfuse(entry.layout, s, shape, tp, rank) for rank, s in enumerate(shards)]
        for name, *stretches in zip(entry.hf, *parts, strict=True):
            assert torch.equal(join(entry.layout, stretches), whole[name]), (entry, tp)


def test_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="9 rows or columns can't be split evenly over 2"):
        part_of(Layout.GATE_UP, (9, 4), SHAPE, 2, 0)


@pytest.mark.parametrize("layout", Layout)
def test_runs_of_rows_are_what_fuse_does(layout: Layout) -> None:
    """Each row carries its own number."""
    rows = {Layout.QKV: [8, 4, 4], Layout.GATE_UP: [8, 8], Layout.VOCAB: [5]}.get(layout, [6])
    tensors = [100 * i + torch.arange(n)[:, None] for i, n in enumerate(rows)]
    fused = fuse(layout, tensors, SHAPE, tp=1)[:, 0].tolist()
    found = [0] * len(fused)
    for run in row_runs(layout, rows, SHAPE):
        found[run.fused : run.fused + run.rows] = [
            100 * run.tensor + run.row + i for i in range(run.rows)
        ]
    assert found == fused
