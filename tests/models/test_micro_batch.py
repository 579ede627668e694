"""What a pack holds, whole and cut up for context parallelism, against its sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
from megatron_prime.models.micro_batch import Grid, cut, make_micro_batch  # noqa: E402
from megatron_prime.types import TokenSequence  # noqa: E402

GRID = Grid(0, 1, 0, 1, stages=1, multiple=1, token_multiple=1, device=torch.device("cpu"))
ROWS = [
    TokenSequence((11, 12, 13, 14, 15), 2),
    TokenSequence((21, 22), 1),
    TokenSequence((31, 32, 33, 34, 35, 36, 37), 4),
]


def test_rows_lie_one_after_the_other() -> None:
    batch = make_micro_batch(ROWS, [2, 0], 12, GRID)
    assert batch.tokens.tolist() == [[31, 32, 33, 34, 35, 36, 37, 11, 12, 13, 14, 15]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]
    assert batch.pack.cu_seqlens_q.tolist() == [0, 7, 12]
    assert batch.pack.max_seqlen_q == 7
    assert batch.targets.tolist() == [35, 36, 37, 13, 14, 15]
    assert batch.pack.wanted is not None
    assert batch.pack.wanted.tolist() == [3, 4, 5, 8, 9, 10]
    assert (batch.slots.tolist(), batch.width) == ([0, 1, 2, 3, 4, 5], 3)
    assert batch.rows.tolist() == [2, 0]


def test_slots_leave_room_for_the_longest_response() -> None:
    batch = make_micro_batch(ROWS, [1, 0], 7, GRID)
    assert (batch.slots.tolist(), batch.width) == ([0, 3, 4, 5], 3)


def test_the_fill_is_a_sequence_of_its_own() -> None:
    batch = make_micro_batch(ROWS, [0], 8, GRID)
    assert batch.pack.cu_seqlens_q.tolist() == [0, 5, 8]
    assert batch.targets.tolist() == [13, 14, 15]


@pytest.mark.parametrize("cp", [2, 3])
def test_context_parallel_ranks_share_each_sequence(cp: int) -> None:
    parts, length = [], 0
    for rank in range(cp):
        grid = replace(GRID, cp_rank=rank, cp_size=cp)
        length = grid.pack_length(sum(grid.sequence_length(len(row.token_ids)) for row in ROWS))
        parts.append(make_micro_batch(ROWS, [0, 1, 2], length, grid))
    assert {part.tokens.shape[1] for part in parts} == {length // cp}
    for part in parts:  # the first and the last chunk of what is left, of each sequence
        rank, start = part.pack.cp_rank, 0
        for padded in part.pack.lengths:
            chunk = padded // (2 * cp)
            early, late = rank * chunk, (2 * cp - 1 - rank) * chunk
            wanted = [*range(early, early + chunk), *range(late, late + chunk)]
            assert part.positions[0, start : start + 2 * chunk].tolist() == wanted
            start += 2 * chunk
    found = [pair for part in parts for pair in zip(part.slots, part.targets, strict=True)]
    slots = sorted((int(slot), int(target)) for slot, target in found)
    assert slots == [(0, 13), (1, 14), (2, 15), (3, 22), (6, 35), (7, 36), (8, 37)]


def test_a_pipeline_gets_packs_of_one_length_and_all_multiples_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (31,), generator=generator).tolist()
    rows = [TokenSequence(tuple(range(length)), 1) for length in lengths]
    grid = replace(GRID, cp_size=2, token_multiple=16, stages=4)
    batches = cut(rows, range(len(rows)), 200, grid)
    assert len(batches) >= 4
    (size,) = {batch.tokens.shape[1] for batch in batches}
    assert size % 16 == 0
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(31))


@pytest.mark.parametrize("stages", [1, 4])
def test_little_is_padding_on_ragged_lengths(stages: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(128).log_normal_(5, 0.7, generator=generator).clamp(8, 1500)
    rows = [TokenSequence(tuple(range(int(length))), 1) for length in lengths]
    grid = replace(GRID, stages=stages, token_multiple=8)
    batches = cut(rows, range(len(rows)), 4096, grid)
    real = sum(len(row.token_ids) for row in rows)
    assert sum(batch.tokens.numel() for batch in batches) < 1.05 * real
