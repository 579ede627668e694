"""How Hugging Face tensors lie inside Megatron's tensor-parallel shards; pure functions.

A shard is made in two steps, each with its inverse. `part_of` says which stretch of each Hugging
Face tensor a rank needs, so that it can be read from the file without the rest; `fuse` lays those
stretches out as Megatron's parameter. `unfuse` takes a shard apart again, and `join` puts the
stretches of all ranks together:

    QKV      rows of q, k, v; fused per key/value head: [q heads of the group, k, v] times groups
    GATE_UP  rows of gate and up; fused one above the other
    VOCAB    rows, with zero rows after the last token so that all shards are equal
    COLUMNS  columns (the layer's input)            WHOLE    the same on every rank
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from megatron_prime.weights.shape import ModelShape


class Layout(Enum):
    """How a Megatron parameter is split over tensor-parallel ranks and fused."""

    QKV = "qkv"
    GATE_UP = "gate_up"
    VOCAB = "vocab"
    COLUMNS = "columns"
    WHOLE = "whole"


def part_of(
    layout: Layout, size: Sequence[int], shape: ModelShape, tp: int, rank: int
) -> tuple[slice, ...]:
    """The stretch of a Hugging Face tensor of `size` that belongs to `rank` of `tp`.

    ValueError when the tensor cannot be split evenly.
    """
    if layout is Layout.WHOLE:
        return (slice(0, size[0]),)
    if layout is Layout.COLUMNS:
        return (slice(0, size[0]), _even(size[1], tp, rank))
    if layout is Layout.VOCAB:
        padded = _even(shape.padded_vocab_size, tp, rank)
        return (slice(min(padded.start, size[0]), min(padded.stop, size[0])),)
    return (_even(size[0], tp, rank),)


def _even(length: int, tp: int, rank: int) -> slice:
    if length % tp:
        raise ValueError(f"{length} rows or columns can't be split evenly over {tp} ranks")
    share = length // tp
    return slice(rank * share, (rank + 1) * share)


def fuse(layout: Layout, parts: Sequence[Tensor], shape: ModelShape, tp: int) -> Tensor:
    """One rank's Megatron parameter from its stretches of the Hugging Face tensors, or a view."""
    if layout is Layout.QKV:
        groups = shape.num_kv_heads // tp
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    if layout is Layout.GATE_UP:
        return torch.cat(list(parts))
    (part,) = parts
    if layout is Layout.VOCAB:
        missing = shape.padded_vocab_size // tp - part.shape[0]
        if missing:
            return torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
    return part


def unfuse(layout: Layout, shard: Tensor, shape: ModelShape, tp: int, rank: int) -> list[Tensor]:
    """Inverse of `fuse`: the rank's stretches of the Hugging Face tensors, possibly as views."""
    if layout is Layout.QKV:
        groups = shape.num_kv_heads // tp
        heads = (shape.num_heads // shape.num_kv_heads, 1, 1)  # of q, k and v in a group
        grouped = shard.unflatten(0, (groups, sum(heads), shape.head_dim))
        return [part.flatten(0, 2) for part in grouped.split(heads, dim=1)]
    if layout is Layout.GATE_UP:
        return list(shard.chunk(2))
    if layout is Layout.VOCAB:
        rows = part_of(layout, (shape.vocab_size,), shape, tp, rank)[0]
        return [shard[: rows.stop - rows.start]]
    return [shard]


def join(layout: Layout, stretches: Sequence[Tensor]) -> Tensor:
    """Inverse of `part_of`: one Hugging Face tensor from the stretches of all ranks in order."""
    if layout is Layout.WHOLE or len(stretches) == 1:
        return stretches[0].contiguous()
    return torch.cat(list(stretches), dim=1 if layout is Layout.COLUMNS else 0)
