"""A Hugging Face checkpoint as a Megatron distributed checkpoint of weights, for any layout.

The same command continues a conversion that was killed. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.errors import RunError
from megatron_prime.runtime.progress import Progress
from megatron_prime.weights.convert import Options, to_megatron
from megatron_prime.weights.convert_sources import HfSource, MegatronSource, verify
from megatron_prime.weights.raw_safetensors import FLAGS
from megatron_prime.weights.shape import ModelShape


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)
    dtype = FLAGS.get(known.dtype)
    shard_bytes = int(known.max_shard_gb * 1e9)
    options = Options(dtype, known.tp, known.pp, shard_bytes, known.workers)
    try:
        to_megatron(known.hf, known.out, options, Progress())
        print(f"wrote {known.out}")
        if known.verify:
            shape = ModelShape.from_hf(known.hf)
            made = MegatronSource(known.out, shape)
            count = verify(HfSource(known.hf, shape), made, shape, dtype)
            print(f"verified: {count} tensors are bit for bit those of {known.hf}")
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--hf", type=Path, required=True, help="directory of config.json and safetensors")
    add("--out", type=Path, required=True, help="directory to make")
    add(
        "--tp",
        type=int,
        default=1,
        help="cut parameters as so many tensor-parallel ranks read them"
        "; any layout can load it, with this one no rank reads more than its own",
    )
    add("--pp", type=int, default=1, help="no file has layers of two of so many pipeline stages")
    add("--dtype", choices=FLAGS, help="default: as it is")
    add("--max-shard-gb", type=float, default=4.0, help="of a file (default: 4)")
    add("--workers", type=int, default=2, help="threads (default: 2)")
    add("--verify", action="store_true", help="read the result again and compare every tensor")
    return parser


if __name__ == "__main__":
    sys.exit(main())
