"""Supervised fine-tuning: the stage before PRIME, on the same Megatron engine.

Each step takes a mini-batch of conversations and minimises the mean negative log-likelihood of its
assistant tokens. The result is a Hugging Face checkpoint that policy, PRM and reference start from.
Conversations that are held out are judged by the same mean, and not learnt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prime.config import RunConfig
from megatron_prime.data.epochs import Epochs
from megatron_prime.data.sft_data import SftExample
from megatron_prime.models.engine import Forward, Loss
from megatron_prime.models.guard import Guard
from megatron_prime.models.mini_batch import MiniBatch, loss_scaling
from megatron_prime.models.scoring import logprobs_of
from megatron_prime.models.training import TrainableEngine
from megatron_prime.stage_steps import StageSteps
from megatron_prime.types import Metrics, RolloutBatch, TokenSequence


def run(
    config: RunConfig,
    engine: TrainableEngine,
    examples: Epochs[SftExample],
    held_out: Sequence[SftExample],
    steps: StageSteps,
) -> None:
    """Take the optimizer steps that are left, each on a mini-batch of `examples`."""
    guard = Guard(config, "sft")
    if steps.done == 0:
        steps.begin(judge(engine, held_out))
    for step in steps:
        started = time.perf_counter()
        batch = as_batch(examples.take())
        sequences, rows = batch.sequences, torch.arange(len(batch.sequences))
        rate = engine.next_rate()
        result = guard.train_step(engine, batch, rows, loss_of(batch.response_mask))
        guard.end_update(0 if result is None else 1)
        assert result is not None, "an update is one mini-batch: end_update stops if it is skipped"
        seconds = time.perf_counter() - started
        figures = {
            "sft/loss": result.loss,
            "sft/grad_norm": result.grad_norm,
            "sft/lr": rate,
            "sft/epoch": examples.epochs,
            "sft/tokens_per_s": sum(len(s.token_ids) for s in sequences) / seconds,
            "time/step_s": seconds,
            **loss_scaling("sft", config.precision.policy, [result]),
        }
        steps.end(step, figures | (judge(engine, held_out) if steps.judged(step) else {}))


def judge(engine: TrainableEngine, held_out: Sequence[SftExample]) -> Metrics:
    """The loss of conversations that are not learnt, over all their assistant tokens."""
    if not held_out:
        return {}
    sequences, mask = as_sequences(held_out)
    logprobs = logprobs_of(engine, sequences)
    return {"held_out/loss": -logprobs[mask].double().mean().item()}


@dataclass(frozen=True, slots=True)
class FineTuning:
    """The model that learns, as `replay` sees it."""

    engine: TrainableEngine


def loss_of(mask: Tensor) -> Loss:
    """A micro-batch's share of the mean negative log-likelihood of the tokens in `mask` [N, T]."""
    tokens = int(mask.sum())

    def loss(forward: Forward) -> Tensor:
        (inside,) = MiniBatch.cut(forward, mask)
        return -torch.where(inside, forward.logprobs, 0.0).sum() / tokens

    return loss


def as_batch(examples: Sequence[SftExample]) -> RolloutBatch:
    """Conversations as a batch without rewards; its response mask is the loss mask."""
    sequences, mask = as_sequences(examples)
    nothing = torch.zeros(mask.shape)
    return RolloutBatch(tuple(sequences), 1, mask, torch.zeros(len(mask)), nothing)


def as_sequences(examples: Sequence[SftExample]) -> tuple[list[TokenSequence], Tensor]:
    """Sequences whose response begins at the first trained token, and the loss mask bool [N, T].

    The mask has holes where a later user turn stands between assistant turns.
    """
    starts = [example.loss_mask.index(True) for example in examples]
    sequences = [
        TokenSequence(example.token_ids, start)
        for example, start in zip(examples, starts, strict=True)
    ]
    mask = torch.zeros(len(examples), max(s.response_length for s in sequences), dtype=torch.bool)
    for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
        tail = example.loss_mask[start:]
        mask[row, : len(tail)] = torch.tensor(tail)
    return sequences, mask
