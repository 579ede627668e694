"""From rows of ragged sequences to the packed tensors of one pipeline micro-batch.

Sequences lie one after the other in a single row of tokens (Megatron's THD format), each with
positions from 0, and attention stays inside each: so no token is spent on padding. Only two things
pad. Context parallelism cuts every sequence into 2 * cp chunks and gives rank r the chunks r and
2 * cp - 1 - r (one early, one late: causal attention is equal work for all), so sequences are
padded on the right to a multiple of 2 * cp. Sequence parallelism and FP8 want the pack's length to
be a multiple of something, and a pipeline wants all its packs equally long (its stages then need
not tell each other shapes before each tensor), so a last sequence of nothing fills them up.

The logits at position p predict token p + 1: response token t of a row is predicted at position
`prompt_length - 1 + t`, and only those positions' logits are ever turned into log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
import torch
from torch import Tensor

from megatron_prime.data.packing import plan_micro_batches
from megatron_prime.models.packed_attention import Pack
from megatron_prime.types import TokenSequence


@dataclass(frozen=True, slots=True)
class Grid:
    """How micro-batches are cut for this rank's place among all ranks."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    stages: int  # of the pipeline
    multiple: int  # what the number of a rank's micro-batches must be a multiple of
    token_multiple: int  # what the tokens of one context-parallel rank must be a multiple of
    device: torch.device

    def sequence_length(self, tokens: int) -> int:
        """Tokens that a sequence of `tokens` takes up in a pack."""
        return _up(tokens, 2 * self.cp_size if self.cp_size > 1 else 1)

    def pack_length(self, tokens: int) -> int:
        """The length of a pack of sequences that take up `tokens`."""
        chunks = 2 * self.cp_size if self.cp_size > 1 else 1
        return _up(tokens, lcm(chunks, self.cp_size * self.token_multiple))


def _up(length: int, multiple: int) -> int:
    return length + -length % multiple


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """b sequences as S tokens on this context-parallel rank, n of them before a response token.

    T is the longest response among the b.
    """

    rows: Tensor  # int64 [b], rows of the batch this was cut from
    tokens: Tensor  # int64 [1, S]
    positions: Tensor  # int64 [1, S], within each sequence
    pack: Pack
    targets: Tensor  # int64 [n], the response tokens that the logits at `pack.wanted` predict
    slots: Tensor  # int64 [n], where in the flattened [b, T] their log-probs belong
    width: int  # T


def make_micro_batch(
    sequences: Sequence[TokenSequence], rows: Sequence[int], length: int, grid: Grid
) -> MicroBatch:
    """Pack `rows` of `sequences` into `length` tokens; take this context-parallel rank's part."""
    chosen = [sequences[row] for row in rows]
    lengths = [grid.sequence_length(len(sequence.token_ids)) for sequence in chosen]
    if fill := length - sum(lengths):
        lengths.append(fill)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    width = max(sequence.response_length for sequence in chosen)
    tokens = torch.zeros(length, dtype=torch.int64)  # of all context-parallel ranks
    slots = torch.full_like(tokens, -1)
    for i, sequence in enumerate(chosen):
        first = int(starts[i])
        ids = np.array(sequence.token_ids, dtype=np.int64)  # faster than torch.tensor by far
        tokens[first : first + len(ids)] = torch.from_numpy(ids)
        before = first + sequence.prompt_length - 1
        steps = torch.arange(sequence.response_length)
        slots[before : before + len(steps)] = i * width + steps
    pack = Pack.of(lengths, grid.cp_rank, grid.cp_size, grid.device)
    mine = pack.tokens_of(grid.cp_rank)
    predicts_at = (slots[mine] >= 0).nonzero().squeeze(1)
    pack.wanted = predicts_at.to(grid.device)
    return MicroBatch(
        rows=torch.tensor(list(rows), device=grid.device),
        tokens=tokens[mine][None].to(grid.device),
        positions=pack.positions[mine][None].to(grid.device),
        pack=pack,
        targets=tokens[mine[predicts_at] + 1].to(grid.device),
        slots=slots[mine[predicts_at]].to(grid.device),
        width=width,
    )


def cut(
    sequences: Sequence[TokenSequence], rows: Sequence[int], max_tokens: int, grid: Grid
) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of `rows`, as `plan_micro_batches` deals them.

    `max_tokens` counts the tokens of one context-parallel rank, the fill of packs aside.
    """
    lengths = [grid.sequence_length(len(sequences[row].token_ids)) for row in rows]
    plan = plan_micro_batches(
        lengths, grid.dp_size, max_tokens * grid.cp_size, grid.stages, grid.multiple
    )
    packs = plan[grid.dp_rank]
    sizes = [grid.pack_length(sum(lengths[i] for i in pack)) for pack in packs]
    if grid.stages > 1:
        sizes = [max(sizes)] * len(sizes)
    return [
        make_micro_batch(sequences, [rows[i] for i in pack], size, grid)
        for pack, size in zip(packs, sizes, strict=True)
    ]
