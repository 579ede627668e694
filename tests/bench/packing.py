"""How much of what goes through the model is padding, on ragged lengths.

    python tests/bench/packing.py

Rows of log-normal length up to 4096 tokens, in micro-batches of 16384 tokens. Compared are this
project's micro-batches, padded micro-batches of rows sorted by length, and padded ones of rows as
they come. No model takes part: it is counted, not timed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from table import row

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.models.micro_batch import Grid, cut  # noqa: E402
from megatron_prime.types import TokenSequence  # noqa: E402

ROWS, LONGEST, MAX_TOKENS = 1024, 4096, 16384
FEW = 64  # rows of the last line
MEDIAN, SPREAD = 700, 0.8  # tokens of a row, log-normal
CPU = torch.device("cpu")
LAYOUTS = {
    "1 replica": Grid(0, 1, 0, 1, 1, 1, 1, CPU),
    "8 replicas": Grid(0, 8, 0, 1, 1, 1, 1, CPU),
    "8 replicas of 4 pipeline stages": Grid(0, 8, 0, 1, 4, 1, 1, CPU),
    "8 replicas of 4 interleaved stages, TP 8 with sequence parallelism": Grid(
        0, 8, 0, 1, 4, 4, 8, CPU
    ),
    "8 replicas, CP 4": Grid(0, 8, 0, 4, 1, 1, 1, CPU),
    "8 replicas, TP 8 with sequence parallelism, blockwise FP8": Grid(0, 8, 0, 1, 1, 1, 1024, CPU),
}


def main() -> None:
    """Print the table's rows."""
    rng = random.Random(0)
    lengths = [min(LONGEST, 16 + int(MEDIAN * rng.lognormvariate(0, SPREAD))) for _ in range(ROWS)]
    few = Grid(0, 8, 0, 1, 4, 1, 1, CPU)
    for name, grid in {**LAYOUTS, f"{FEW} rows, 8 replicas of 4 pipeline stages": few}.items():
        taken = lengths if grid is not few else lengths[:FEW]
        real = sum(taken)
        by_length = real / padded(sorted(taken, reverse=True))
        ordered = real / padded(taken)
        loads = ours(taken, grid)
        efficiency = real / sum(loads)
        slowest = max(loads) * len(loads) / sum(loads)
        row(
            f"padding, {name}",
            f"{1 - efficiency:.1%}",
            f"{1 - by_length:.1%}",
            f"{efficiency / by_length:.2f} ×",
            "< 5 %",
            f"{len(taken)} rows, {real} real tokens; theirs: padded, sorted by length (as they come"
            f" {1 - ordered:.0%}); the busiest rank has {slowest:.3f} × the mean",
        )


def ours(lengths: Sequence[int], grid: Grid) -> list[int]:
    """Tokens, padding included, that go through the model on each data-parallel replica."""
    rows = [TokenSequence((0,) * length, 1) for length in lengths]
    loads = []
    for rank in range(grid.dp_size):
        packs = cut(rows, range(len(rows)), MAX_TOKENS, replace(grid, dp_rank=rank))
        loads.append(sum(batch.tokens.shape[1] for batch in packs) * grid.cp_size)
    return loads


def padded(lengths: Sequence[int]) -> int:
    """Tokens of padded micro-batches that are filled row after row up to MAX_TOKENS."""
    total, count, longest = 0, 0, 0
    for length in lengths:
        if (count + 1) * max(longest, length) > MAX_TOKENS:
            total, count, longest = total + count * longest, 0, 0
        count, longest = count + 1, max(longest, length)
    return total + count * longest


if __name__ == "__main__":
    main()
