"""A Hugging Face checkpoint as a Megatron distributed checkpoint of weights, for any layout.

The same command continues a conversion that was killed. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.runtime.progress import Progress
from megatron_prime.weights.convert import to_megatron
from megatron_prime.weights.convert_command import add_options, finish, options_of
from megatron_prime.weights.numbers import whole


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)

    def job() -> tuple[int, Path]:
        return to_megatron(known.hf, known.out, options_of(known), Progress()), known.hf

    return finish(job, known.out, known.verify)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--hf", type=Path, required=True, help="directory of config.json and safetensors")
    add(
        "--tp",
        type=whole,
        default=1,
        help="cut parameters as so many tensor-parallel ranks read them"
        "; any layout can load it, with this one no rank reads more than its own",
    )
    add("--pp", type=whole, default=1, help="no file has layers of two of so many pipeline stages")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
