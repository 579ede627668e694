"""The same text through `transformers`, Megatron and a server: log-probs, and where they part.

The first two run in fp32 in this process, so both models must fit into memory; a running SGLang
server (`--server URL`) computes in its own precision. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_prime.errors import RunError, WeightsError
from megatron_prime.runtime.compat import before_megatron_import, install_cpu_shim
from megatron_prime.weights.convert_sources import HfSource, MegatronSource
from megatron_prime.weights.directories import MODELS, weights_in
from megatron_prime.weights.shape import ModelShape

SERVER_S = 120.0  # for its answer
TEXT = "Let x be the number of apples. Then 3x + 2 = 14, so x = 4 and the answer is \\boxed{4}."


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when they agree, 1 for an error, 2 when they part."""
    known = _parser().parse_args(arguments)
    before_megatron_import()
    try:
        checkpoint = weights_in(known.checkpoint, known.model).folder
        shape = ModelShape.from_hf(known.hf)
        HfSource(known.hf, shape)  # both are whole, and of this shape: no library would say so
        MegatronSource(checkpoint, shape)
        words, token_ids = _tokens(known.hf, known.text, known.tokens)
        if beyond := [token for token in token_ids if not 0 <= token < shape.vocab_size]:
            raise WeightsError(f"found token {beyond[0]}, wanted 0 to {shape.vocab_size - 1}")
        served = asyncio.run(_through_server(known.server, token_ids)) if known.server else None
        install_cpu_shim()
        from megatron_prime.models import side_by_side

        reference = side_by_side.through_transformers(known.hf, token_ids)
        ours = side_by_side.through_megatron(known.hf, checkpoint, token_ids)
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    wanted = reference.logprobs.tolist()
    columns: dict[str, Sequence[float]] = {"Megatron": ours.logprobs.tolist()}
    if served:
        columns["server"] = served
    worst = _print_table(token_ids, words, wanted, columns)
    for name, far in worst.items():
        print(f"largest difference of a log-prob, {name}: {far:.2e}")
    parted = [
        f"{name} (relative difference {far:.1e})"
        for name, far in side_by_side.differences(reference, ours).items()
        if not far <= known.tolerance
    ]
    if parted:
        print(f"hidden states part first at: {parted[0]}")
    elif worst["Megatron"] > known.tolerance:
        print("hidden states agree: the output layer or the vocabulary's padding parts them")
    else:
        print(f"all layers agree to {known.tolerance:g}")
    astray = bool(served) and not worst["server"] <= known.server_tolerance
    if astray:
        print(
            f"the server parts by more than {known.server_tolerance:g} nats (--server-tolerance): "
            "it has other weights, or rounds more coarsely"
        )
    return 2 if parted or astray or not worst["Megatron"] <= known.tolerance else 0


def _print_table(
    token_ids: Sequence[int],
    words: Sequence[str],
    wanted: Sequence[float],
    columns: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """A line per token but the first; returns each column's largest difference from `wanted`."""
    heads = "".join(f"{name:>13} {'difference':>11}" for name in columns)
    print(f"{'position':>8} {'token':>8} {'transformers':>13}{heads}")
    for i, told in enumerate(wanted):
        found = [column[i] for column in columns.values()]
        cells = "".join(f"{value:13.6f} {value - told:11.2e}" for value in found)
        print(f"{i + 1:8} {token_ids[i + 1]:8} {told:13.6f}{cells} {words[i + 1]}")
    return {
        name: float(np.abs(np.subtract(column, wanted)).max())  # NaN, should there be one
        for name, column in columns.items()
    }


async def _through_server(url: str, token_ids: Sequence[int]) -> tuple[float, ...]:
    """What a running SGLang server gives the tokens. Raises SglangError."""
    from megatron_prime.rollout.sglang_client import SglangClient

    async with SglangClient(url.rstrip("/"), os.environ.get("SGLANG_API_KEY", "")) as client:
        return await client.score(token_ids, SERVER_S)


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
    add(
        "--model",
        choices=[name for name in MODELS if name != "critic"],
        default="policy",
        help="of a run (default: policy)",
    )
    add("--text", default=TEXT)
    add("--tokens", help="token numbers in place of a text: 1,2,3")
    add("--tolerance", type=float, default=1e-4, help="what still counts as rounding")
    add("--server", metavar="URL", help="a running SGLang server; its key in SGLANG_API_KEY")
    add("--server-tolerance", type=float, default=0.1, help="of a log-prob (bf16 rounds coarsely)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
