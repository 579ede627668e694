"""The policy's update and its scoring, against `transformers` and torch, in one process.

    python tests/bench/update.py FOLDER [--repeat N] [--hidden H --layers L --vocabulary V]

Same model, rows, loss, optimizer and micro-batch budget on both sides, turn by turn. In the end
both must have nearly the same weights: that proves that they did the same work. FOLDER is
model.py's; with --hidden a random model of that size takes its model's place.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from plain import PlainModel
from session import one_rank, ragged_rows, run_config
from table import faster
from torch import Tensor

from megatron_prime.types import OldLogprobs, ScoredBatch, TrainBatch

WARM_UP = 2
LARGEST_DIFFERENCE = 0.01  # of two models' weights, as a share of how far they moved


def main(arguments: list[str] | None = None) -> None:
    """Print two rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    known = parser.parse_args(arguments)
    model = known.folder / "model"
    if known.hidden:
        model = larger_model(known.folder, known.hidden, known.layers, known.vocabulary)
    config = run_config(known.folder, model)
    with one_rank(config):
        from megatron_prime.models.factory import policy_of

        ours = policy_of(config)
        theirs = PlainModel(model, config.policy)
        rows = ragged_rows(theirs.model.config.vocab_size)
        start = {name: tensor.clone() for name, tensor in theirs.model.state_dict().items()}
        size = f"{sum(tensor.numel() for tensor in start.values()) / 1e6:.1f} M parameters"

        scored = alternate(known.repeat, lambda: ours.logprobs(rows), lambda: theirs.logprobs(rows))
        batch = train_batch(rows, theirs.logprobs(rows))
        updated = alternate(known.repeat, lambda: ours.update(batch), lambda: theirs.update(batch))
        difference = compare(dict(ours.weights().whole()), theirs.model.state_dict(), start)
    tokens = sum(len(sequence.token_ids) for sequence in rows.sequences)
    remarks = f"{len(rows.sequences)} ragged rows, {tokens} tokens"
    faster(
        f"update step, {size}",
        *updated,
        "≥ 1 ×",
        f"{remarks}; weights differ by {difference:.1e} of their movement",
    )
    faster(f"log-prob scoring, {size}", *scored, "≥ 1 ×", remarks)


def larger_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """A random Qwen2, with heads of 64."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = folder / f"model_{hidden}_{layers}_{vocabulary}"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(path)
    return path


def train_batch(rows: Any, old_logprobs: Tensor) -> TrainBatch:
    """Advantages of both signs."""
    advantages = torch.randn(rows.response_mask.shape, generator=torch.Generator().manual_seed(1))
    old = OldLogprobs.scored(rows, torch.arange(len(rows.sequences)), old_logprobs)
    return TrainBatch(ScoredBatch(rows, old, None), None, advantages * rows.response_mask)


def alternate(
    repeat: int, ours: Callable[[], object], theirs: Callable[[], object]
) -> tuple[float, float]:
    """Median seconds of each, turn by turn, after a warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM_UP + repeat):
        for work, kept in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            work()
            if turn >= WARM_UP:
                kept.append(time.perf_counter() - started)
    return median(seconds[0]), median(seconds[1])


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far the two are apart, as a share of how far they moved; AssertionError if too far."""
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    moved = sum(float((theirs[name] - start[name]).square().sum()) for name in ours)
    difference = (apart / moved) ** 0.5
    assert difference < LARGEST_DIFFERENCE, f"weights differ by {difference:.3f} of their movement"
    return difference


if __name__ == "__main__":
    main()
