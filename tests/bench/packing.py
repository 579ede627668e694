"""How much of what goes through the model is padding, on ragged lengths.

    python tests/bench/packing.py

Rows of log-normal length up to 4096 tokens, in micro-batches of 16384 tokens. Compared are this
project's micro-batches, padded micro-batches of rows sorted by length, and padded ones of rows as
they come. No model takes part: it is counted, not timed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from table import row

from megatron_prime.data.packing import plan_micro_batches

ROWS, LONGEST, MAX_TOKENS = 1024, 4096, 16384
MEDIAN, SPREAD = 700, 0.8  # tokens of a row, log-normal
REPLICAS = (1, 8)


def main() -> None:
    """Print the table's rows."""
    rng = random.Random(0)
    lengths = [min(LONGEST, 16 + int(MEDIAN * rng.lognormvariate(0, SPREAD))) for _ in range(ROWS)]
    real = sum(lengths)
    ordered = real / padded(lengths)
    by_length = real / padded(sorted(lengths, reverse=True))
    for replicas in REPLICAS:
        loads = ours(lengths, replicas)
        efficiency = real / sum(loads)
        slowest = max(loads) * replicas / sum(loads)
        row(
            f"padding, {replicas} data-parallel rank{'s' * (replicas > 1)}",
            f"{1 - efficiency:.1%}",
            f"{1 - by_length:.1%}",
            f"{efficiency / by_length:.2f} ×",
            "< 5 %",
            f"{ROWS} rows, {real} real tokens; theirs: padded, sorted by length (as they come"
            f" {1 - ordered:.0%}); the busiest rank has {slowest:.3f} × the mean",
        )


def ours(lengths: Sequence[int], replicas: int) -> list[int]:
    """Tokens that go through the model on each data-parallel rank."""
    plan = plan_micro_batches(lengths, replicas, MAX_TOKENS)
    return [sum(through_model([lengths[i] for i in batch]) for batch in rank) for rank in plan]


def through_model(micro_batch: Sequence[int]) -> int:
    """Tokens that a pack of these lengths puts through the model; on a CPU attention alone pads."""
    return sum(micro_batch)


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
