"""Cutting a mini-batch into micro-batches of bounded size, evenly over data-parallel ranks.

A micro-batch is padded to its longest row: rows × longest tokens go through the model, and that is
what must fit into memory. So rows are sorted by length and neighbours share a micro-batch. All
ranks get the same number of micro-batches, none empty, because they meet in the same collectives;
and about the same number of tokens, because the fastest waits for the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence

MicroBatch = list[int]  # row numbers, longest row first


def plan_micro_batches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    min_micro_batches: int = 1,
    unit: int = 1,
) -> list[list[MicroBatch]]:
    """Deal rows to ranks and cut each rank's share: `plan[dp_rank][micro_batch]` lists row numbers.

    `lengths[row]` and `max_tokens` are in tokens; a micro-batch has rows × longest row ≤
    max_tokens. Each rank gets at least `min_micro_batches` if it has as many rows, and not more
    than the cap asks for. `unit` consecutive rows (a group) stay on one rank. The plan depends on
    the arguments alone. Raises ValueError for a row above `max_tokens`, for rows that are not whole
    units, and where a rank would be left with an empty micro-batch.
    """
    for row, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"found row {row} of {length} tokens, wanted at most micro_batch_tokens ="
                f" {max_tokens}; raise micro_batch_tokens or shorten prompts and responses"
            )
    if len(lengths) % unit:
        raise ValueError(f"found {len(lengths)} rows, wanted a multiple of the unit of {unit} rows")
    shares = _deal(lengths, dp_size, unit)
    fewest = min(len(share) for share in shares)
    needed = max(len(_cut(share, lengths, max_tokens)) for share in shares)
    count = max(needed, min(min_micro_batches, fewest))
    if not 0 < count <= fewest:
        raise ValueError(
            f"found mini_batch_size = {len(lengths)} rows for {dp_size} data-parallel ranks, which"
            f" leaves a rank {fewest} rows for {max(count, 1)} micro-batches; make mini_batch_size"
            f" a multiple of {dp_size * unit}, or use fewer data-parallel ranks"
        )
    return [_cut_into(share, lengths, count, max_tokens) for share in shares]


def _deal(lengths: Sequence[int], dp_size: int, unit: int) -> list[list[int]]:
    """Each rank's rows, longest first.

    Units are dealt in rounds from the largest on, one to each rank, the round's largest to the rank
    with the least. So numbers of units differ by at most one, and after whole rounds no two ranks
    differ by more tokens than the largest and the smallest unit do.
    """
    units = [range(first, first + unit) for first in range(0, len(lengths), unit)]
    tokens = {rows: sum(lengths[row] for row in rows) for rows in units}
    units.sort(key=lambda rows: -tokens[rows])
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for first in range(0, len(units), dp_size):
        least_first = sorted(range(dp_size), key=lambda rank: loads[rank])
        for rank, rows in zip(least_first, units[first : first + dp_size], strict=False):
            shares[rank].extend(rows)
            loads[rank] += tokens[rows]
    return [sorted(share, key=lambda row: (-lengths[row], row)) for share in shares]


def _cut(rows: list[int], lengths: Sequence[int], max_tokens: int) -> list[MicroBatch]:
    """The fewest micro-batches of `rows` (longest first) under `max_tokens`."""
    cut: list[MicroBatch] = []
    for row in rows:
        if cut and (len(cut[-1]) + 1) * lengths[cut[-1][0]] <= max_tokens:
            cut[-1].append(row)
        else:
            cut.append([row])
    return cut


def _cut_into(
    rows: list[int], lengths: Sequence[int], count: int, max_tokens: int
) -> list[MicroBatch]:
    """Exactly `count` micro-batches of `rows` (longest first), the largest as small as can be."""
    low, high = lengths[rows[0]], max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(rows, lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    cut = _cut(rows, lengths, high)
    while len(cut) < count:
        largest = max(cut, key=lambda batch: (len(batch) > 1, len(batch) * lengths[batch[0]]))
        half = (len(largest) + 1) // 2
        at = cut.index(largest)
        cut[at : at + 1] = [largest[:half], largest[half:]]
    return cut
