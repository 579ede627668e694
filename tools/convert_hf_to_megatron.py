"""A Hugging Face checkpoint as a Megatron distributed checkpoint of weights, for any layout.

The same command continues a conversion that was killed. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.errors import RunError
from megatron_prime.runtime.progress import Progress
from megatron_prime.weights.convert import to_megatron
from megatron_prime.weights.convert_plan import Options
from megatron_prime.weights.dtypes import FLAGS
from megatron_prime.weights.numbers import gigabytes, whole


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)
    options = Options(
        FLAGS.get(known.dtype),
        known.tp,
        known.pp,
        known.max_shard_gb,
        known.workers,
        known.verify,
    )
    there = known.out.exists()
    try:
        count = to_megatron(known.hf, known.out, options, Progress())
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    if not there:
        print(f"wrote {known.out}")
    if known.verify:
        print(f"verified: {count} tensors are bit for bit those of {known.hf}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--hf", type=Path, required=True, help="directory of config.json and safetensors")
    add("--out", type=Path, required=True, help="directory to make")
    add(
        "--tp",
        type=whole,
        default=1,
        help="cut parameters as so many tensor-parallel ranks read them"
        "; any layout can load it, with this one no rank reads more than its own",
    )
    add("--pp", type=whole, default=1, help="no file has layers of two of so many pipeline stages")
    add("--dtype", choices=FLAGS, help="default: as it is")
    add("--max-shard-gb", type=gigabytes, default="4", help="of a file (default: 4)")
    add("--workers", type=whole, default=2, help="threads (default: 2)")
    add(
        "--verify",
        action="store_true",
        help="compare all before OUT appears, or an OUT that is there",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
