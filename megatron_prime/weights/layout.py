"""How Hugging Face tensors lie inside Megatron's tensor-parallel shards; pure functions.

A shard is made in two steps, each with its inverse. `part_of` says which stretch of each Hugging
Face tensor a rank needs, so that it can be read from the file without the rest; `fuse` lays those
stretches out as Megatron's parameter. `unfuse` takes a shard apart again, and `join` puts the
stretches of all ranks together:

    QKV      rows of q, k, v; fused per key/value head: [q heads of the group, k, v] times groups
    GATE_UP  rows of gate and up; fused one above the other
    VOCAB    rows, with zero rows after the last token so that all shards are equal
    COLUMNS  columns (the layer's input)            WHOLE    the same on every rank

`row_runs` says the same of the whole model's parameter in numbers of rows, for the converters:
they move bytes from file to file and need no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from megatron_prime.weights.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor


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
    import torch

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
    import torch

    if layout is Layout.WHOLE or len(stretches) == 1:
        return stretches[0].contiguous()
    return torch.cat(list(stretches), dim=1 if layout is Layout.COLUMNS else 0)


class Run(NamedTuple):
    """Rows of a Megatron parameter that are consecutive rows of one Hugging Face tensor."""

    fused: int  # the first row there
    tensor: int  # which of the entry's tensors
    row: int  # the first row of it
    rows: int


def row_runs(layout: Layout, rows: Sequence[int], shape: ModelShape) -> list[Run]:
    """What `fuse` makes of whole tensors with so many `rows`; padding is left out."""
    if layout is not Layout.QKV:
        starts = [sum(rows[:i]) for i in range(len(rows))]
        return [Run(start, i, 0, n) for i, (start, n) in enumerate(zip(starts, rows, strict=True))]
    each = [n // shape.num_kv_heads for n in rows]  # rows of q, k and v per key/value head
    group, starts = sum(each), [sum(each[:i]) for i in range(len(each))]
    return [
        Run(head * group + starts[i], i, head * each[i], each[i])
        for head in range(shape.num_kv_heads)
        for i in range(len(rows))
    ]
