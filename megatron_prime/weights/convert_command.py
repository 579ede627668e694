"""What the two converting tools share: options, exit statuses and the last words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_prime.errors import RunError
from megatron_prime.weights.convert_plan import Options
from megatron_prime.weights.dtypes import FLAGS
from megatron_prime.weights.numbers import gigabytes, whole


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that both directions have."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory to make")
    add("--dtype", choices=FLAGS, help="default: as it is")
    add("--max-shard-gb", type=gigabytes, default="4", help="of a file (default: 4)")
    add("--workers", type=whole, default=2, help="threads (default: 2)")
    add(
        "--verify",
        action="store_true",
        help="compare all before OUT appears, or an OUT that is there",
    )


def options_of(known: argparse.Namespace) -> Options:
    """`tp` and `pp` where the tool has them."""
    return Options(
        FLAGS.get(known.dtype),
        getattr(known, "tp", 1),
        getattr(known, "pp", 1),
        known.max_shard_gb,
        known.workers,
        known.verify,
    )


def finish(job: Callable[[], tuple[int, Path]], out: Path, verify: bool) -> int:
    """Exit status of a conversion: 0, 1 with the reason, or 130 after Ctrl-C.

    `job` returns how many tensors there are, and whose they are.
    """
    there = out.exists()
    try:
        count, origin = job()
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    if not there:
        print(f"wrote {out}")
    if verify:
        print(f"verified: {count} tensors are bit for bit those of {origin}")
    return 0
