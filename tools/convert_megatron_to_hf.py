"""A run's checkpoint, or a converted one, as a Hugging Face directory with tokenizer and config.

The same command continues a conversion that was killed. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.errors import RunError
from megatron_prime.runtime.progress import Progress
from megatron_prime.weights.convert import Options, to_hf
from megatron_prime.weights.convert_sources import HfSource, MegatronSource, verify
from megatron_prime.weights.directories import MODELS, check_sizes, weights_in
from megatron_prime.weights.raw_safetensors import FLAGS
from megatron_prime.weights.safetensors_io import WeightsError
from megatron_prime.weights.shape import ModelShape


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)
    dtype = FLAGS.get(known.dtype)
    options = Options(dtype, shard_bytes=int(known.max_shard_gb * 1e9), workers=known.workers)
    try:
        weights = weights_in(known.checkpoint, known.model)
        hf_dir = known.hf or weights.hf_dir
        if hf_dir is None or not (hf_dir / "config.json").exists():
            raise WeightsError(
                f"{known.checkpoint}: no config.json at {hf_dir}; give --hf, the "
                "Hugging Face directory that the model started from"
            )
        check_sizes(weights.folder)
        to_hf(weights.folder, hf_dir, known.out, options, Progress())
        print(f"wrote {known.out}")
        if known.verify:
            shape = ModelShape.from_hf(hf_dir)
            made = HfSource(known.out, shape)
            count = verify(MegatronSource(weights.folder, shape), made, shape, dtype)
            print(f"verified: {count} tensors are bit for bit those of {weights.folder}")
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
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
    add("--max-shard-gb", type=float, default=4.0, help="of a file (default: 4)")
    add("--workers", type=int, default=2, help="threads (default: 2)")
    add("--verify", action="store_true", help="read the result again and compare every tensor")
    return parser


if __name__ == "__main__":
    sys.exit(main())
