"""Cutting a mini-batch into packed micro-batches of bounded size, evenly over data-parallel ranks.

A micro-batch is a pack: its rows lie one after the other without padding between them, so what
goes through the model, and must fit into memory, is the sum of their lengths. All ranks get the
same number of micro-batches, none empty, because they meet in the same collectives; and all
micro-batches get about the same number of tokens, because in a pipeline, and between replicas, the
fastest waits for the slowest.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

MicroBatch = list[int]  # row numbers, longest row first
_CLOSE = 0.005  # packs that differ by less than this share of the fullest are equal enough


def plan_micro_batches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    stages: int = 1,
    multiple: int = 1,
) -> list[list[MicroBatch]]:
    """Deal rows to packs and packs to ranks: `plan[dp_rank][micro_batch]` lists row numbers.

    `lengths[row]` and `max_tokens` are in tokens; a pack's lengths add up to at most `max_tokens`.
    Each rank gets the fewest packs that the cap allows; with pipeline `stages`, up to one a stage
    if that shortens the pipeline's time; always a multiple of `multiple` (which interleaved
    pipelines want). The plan depends on the arguments alone. Raises ValueError for a row above
    `max_tokens`, and where there are too few rows for one in each pack.
    """
    for row, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"found row {row} of {length} tokens, wanted at most micro_batch_tokens ="
                f" {max_tokens}; raise micro_batch_tokens or shorten prompts and responses"
            )
    most = len(lengths) // dp_size
    fewest = max(1, -(-sum(lengths) // (max_tokens * dp_size)))
    best: list[MicroBatch] = []
    shortest = math.inf
    for count in range(_up(fewest, multiple), most + 1, multiple):
        packs = _spread(lengths, dp_size * count)
        longest = max(sum(lengths[row] for row in pack) for pack in packs)
        if longest <= max_tokens and (time := (count + stages - 1) * longest) < shortest:
            best, shortest = packs, time
        if best and count >= stages:
            break
    if best:
        return _deal(best, lengths, dp_size)
    raise ValueError(
        f"found {len(lengths)} rows for {dp_size} data-parallel ranks, which is too few for at"
        f" least {multiple} micro-batches of micro_batch_tokens = {max_tokens} on each; raise"
        " mini_batch_size or micro_batch_tokens, or use fewer data-parallel ranks"
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _spread(lengths: Sequence[int], count: int) -> list[MicroBatch]:
    """Rows dealt into `count` packs, the longest first, each to the pack with the fewest tokens."""
    packs: list[MicroBatch] = [[] for _ in range(count)]
    loads = [(0, 0, i) for i in range(count)]  # tokens, rows, pack
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        tokens, rows, i = heapq.heappop(loads)
        packs[i].append(row)
        heapq.heappush(loads, (tokens + lengths[row], rows + 1, i))
    _level(packs, lengths)
    return [sorted(pack, key=lambda row: (-lengths[row], row)) for pack in packs]


def _level(packs: list[MicroBatch], lengths: Sequence[int]) -> None:
    """Swap a row of the fullest pack for one of the emptiest, in place, while they get closer.

    Dealing leaves packs of a few rows some percent apart; this ends within `_CLOSE`, or where no
    swap helps.
    """
    tokens = [sum(lengths[row] for row in pack) for pack in packs]
    while (gap := max(tokens) - min(tokens)) > _CLOSE * max(tokens):
        high, low = tokens.index(max(tokens)), tokens.index(min(tokens))
        swaps = [
            (abs(gap - 2 * (lengths[a] - lengths[b])), a, b)
            for a in packs[high]
            for b in packs[low]
            if 0 < lengths[a] - lengths[b] < gap
        ]
        if not swaps:
            return
        _, a, b = min(swaps)
        packs[high].remove(a)
        packs[low].remove(b)
        packs[high].append(b)
        packs[low].append(a)
        tokens[high] -= lengths[a] - lengths[b]
        tokens[low] += lengths[a] - lengths[b]


def _deal(packs: list[MicroBatch], lengths: Sequence[int], dp_size: int) -> list[list[MicroBatch]]:
    """Packs in rounds from the largest on, the round's largest to the rank with the least."""
    tokens = [sum(lengths[row] for row in pack) for pack in packs]
    order = sorted(range(len(packs)), key=lambda i: (-tokens[i], i))
    shares: list[list[MicroBatch]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for first in range(0, len(order), dp_size):
        least_first = sorted(range(dp_size), key=lambda rank: loads[rank])
        for rank, i in zip(least_first, order[first : first + dp_size], strict=True):
            shares[rank].append(packs[i])
            loads[rank] += tokens[i]
    return shares
