"""The same text through `transformers` and Megatron: log-probs side by side, and where they part.

Both run in fp32 in this process, so both models must fit into memory. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prime.errors import RunError
from megatron_prime.runtime.compat import before_megatron_import, install_cpu_shim
from megatron_prime.weights.directories import MODELS, weights_in
from megatron_prime.weights.safetensors_io import WeightsError

TEXT = "Let x be the number of apples. Then 3x + 2 = 14, so x = 4 and the answer is \\boxed{4}."


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when they agree, 1 for an error, 2 when they part."""
    known = _parser().parse_args(arguments)
    before_megatron_import()
    try:
        checkpoint = weights_in(known.checkpoint, known.model).folder
        words, token_ids = _tokens(known.hf, known.text, known.tokens)
        install_cpu_shim()
        from megatron_prime.models import side_by_side

        reference = side_by_side.through_transformers(known.hf, token_ids)
        ours = side_by_side.through_megatron(known.hf, checkpoint, token_ids)
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'position':>8} {'token':>8} {'transformers':>13} {'Megatron':>13} {'difference':>11}")
    pairs = zip(reference.logprobs.tolist(), ours.logprobs.tolist(), strict=True)
    for i, (wanted, found) in enumerate(pairs, 1):
        print(
            f"{i:8} {token_ids[i]:8} {wanted:13.6f} {found:13.6f} {found - wanted:11.2e} {words[i]}"
        )
    worst = float((ours.logprobs - reference.logprobs).abs().max())
    parted = [
        f"{name} (relative difference {far:.1e})"
        for name, far in side_by_side.differences(reference, ours).items()
        if not far <= known.tolerance
    ]
    print(f"largest difference of a log-prob: {worst:.2e}")
    if parted:
        print(f"hidden states part first at: {parted[0]}")
    elif worst > known.tolerance:
        print("hidden states agree: the output layer or the vocabulary's padding parts them")
    else:
        print(f"all layers agree to {known.tolerance:g}")
    return 2 if parted or not worst <= known.tolerance else 0


def _tokens(hf_dir: Path, text: str, given: str | None) -> tuple[list[str], list[int]]:
    """The tokens' texts, as far as known, and their numbers."""
    if given:
        try:
            token_ids = [int(token) for token in given.split(",")]
        except ValueError as error:
            raise WeightsError(f"--tokens: found {given!r}, wanted numbers: 1,2,3") from error
        words = [""] * len(token_ids)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf_dir)
        token_ids = tokenizer(text)["input_ids"]
        words = [repr(tokenizer.decode([token])) for token in token_ids]
    if len(token_ids) < 2:
        raise WeightsError(f"found {len(token_ids)} tokens, wanted two or more; give a longer text")
    return words, token_ids


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--hf", type=Path, required=True, help="the Hugging Face directory")
    add("--checkpoint", type=Path, required=True, help="checkpoints/step_…, or a converted one")
    add("--model", choices=MODELS, default="policy", help="of a run (default: policy)")
    add("--text", default=TEXT)
    add("--tokens", help="token numbers in place of a text: 1,2,3")
    add("--tolerance", type=float, default=1e-4, help="what still counts as rounding")
    return parser


if __name__ == "__main__":
    sys.exit(main())
