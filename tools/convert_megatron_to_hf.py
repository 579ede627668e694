"""A run's checkpoint, or a converted one, as a Hugging Face directory with tokenizer and config.

The same command continues a conversion that was killed. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.errors import RunError, WeightsError
from megatron_prime.runtime.progress import Progress
from megatron_prime.weights.convert import to_hf
from megatron_prime.weights.convert_plan import Options
from megatron_prime.weights.directories import MODELS, check_sizes, weights_in
from megatron_prime.weights.dtypes import FLAGS
from megatron_prime.weights.numbers import gigabytes, whole


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)
    options = Options(
        FLAGS.get(known.dtype),
        shard_bytes=known.max_shard_gb,
        workers=known.workers,
        verify=known.verify,
    )
    there = known.out.exists()
    try:
        weights = weights_in(known.checkpoint, known.model)
        hf_dir = known.hf or weights.hf_dir
        if hf_dir is None or not (hf_dir / "config.json").exists():
            raise WeightsError(
                f"{known.checkpoint}: no config.json at {hf_dir}; give --hf, the "
                "Hugging Face directory that the model started from"
            )
        check_sizes(weights.folder)
        count = to_hf(weights.folder, hf_dir, known.out, options, Progress())
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    if not there:
        print(f"wrote {known.out}")
    if known.verify:
        print(f"verified: {count} tensors are bit for bit those of {weights.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoints/step_…, or a converted one")
    add("--out", type=Path, required=True, help="directory to make")
    add("--model", choices=MODELS, default="policy", help="of a run (default: policy)")
    add(
        "--hf",
        type=Path,
        help="config.json, tokenizer and so on; default: what the run started "
        "from, or what the converted one brought along",
    )
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
