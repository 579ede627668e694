"""A run's checkpoint, or a converted one, as a Hugging Face directory with tokenizer and config.

The same command continues a conversion that was killed. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.errors import WeightsError
from megatron_prime.runtime.progress import Progress
from megatron_prime.weights.convert import to_hf
from megatron_prime.weights.convert_command import add_options, finish, options_of
from megatron_prime.weights.directories import MODELS, check_sizes, weights_in


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)

    def job() -> tuple[int, Path]:
        weights = weights_in(known.checkpoint, known.model)
        hf_dir = known.hf or weights.hf_dir
        if hf_dir is None or not (hf_dir / "config.json").exists():
            raise WeightsError(
                f"{known.checkpoint}: no config.json at {hf_dir}; give --hf, the "
                "Hugging Face directory that the model started from"
            )
        check_sizes(weights.folder)
        critic = "critic" in (known.model, weights.folder.name)
        count = to_hf(weights.folder, hf_dir, known.out, options_of(known), Progress(), critic)
        return count, weights.folder

    return finish(job, known.out, known.verify)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoints/step_…, or a converted one")
    add("--model", choices=MODELS, default="policy", help="of a run (default: policy)")
    add(
        "--hf",
        type=Path,
        help="config.json, tokenizer and so on; default: what the run started "
        "from, or what the converted one brought along",
    )
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
