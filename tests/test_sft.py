"""Fine-tuning: what is learnt of a conversation, in which order, and the loss by value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import pytest
import torch

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.data.sft_data import SftExample
from megatron_prime.models.engine import Forward, Loss
from megatron_prime.models.training import StepResult
from megatron_prime.sft import as_sequences, run, shuffled
from megatron_prime.types import TokenSequence


def example(text: str) -> SftExample:
    """A token per character, `.` for one that is not learnt, any other for one that is."""
    return SftExample(tuple(range(10, 10 + len(text))), tuple(mark != "." for mark in text))


def rows_of(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if inside else "." for inside in row) for row in mask.tolist()]


def test_a_response_begins_at_the_first_token_learnt_and_has_holes_for_later_users() -> None:
    texts = ["..xx...xxx", "....x", ".x.x"]
    sequences, mask = as_sequences([example(text) for text in texts])
    assert [s.prompt_length for s in sequences] == [2, 4, 1]
    assert [s.response_length for s in sequences] == [8, 1, 3]
    assert [s.token_ids for s in sequences] == [tuple(range(10, 10 + len(t))) for t in texts]
    assert mask.dtype == torch.bool
    assert rows_of(mask) == ["xx...xxx", "x.......", "x.x....."]


def test_the_mask_is_as_wide_as_the_longest_response_not_the_longest_conversation() -> None:
    sequences, mask = as_sequences([example("." * 20 + "x"), example(".xxx")])
    assert mask.shape == (2, 3)
    assert max(s.response_length for s in sequences) == 3


def test_every_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    examples = [example("." + "x" * n) for n in range(1, 13)]
    batches = list(islice(shuffled(examples, 4, seed=3), 9))
    assert {len(batch) for batch in batches} == {4}
    epochs = [list(chain(*batches[start : start + 3])) for start in (0, 3, 6)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(examples)
    orders = [tuple(len(e.token_ids) for e in epoch) for epoch in [examples, *epochs]]
    assert len(set(orders)) == 4


def test_the_seed_fixes_the_order() -> None:
    examples = [example("." + "x" * n) for n in range(1, 13)]

    def first(seed: int) -> list[list[SftExample]]:
        return list(islice(shuffled(examples, 4, seed), 6))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_an_incomplete_mini_batch_is_left_out() -> None:
    examples = [example("." + "x" * n) for n in range(1, 8)]
    first, second, third = islice(shuffled(examples, 3, seed=0), 3)
    assert not set(first) & set(second), "6 of 7 in the first epoch"
    assert len(set(third)) == 3


def test_too_few_conversations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"found 2 conversations.*sft\.mini_batch_size = 3"):
        next(shuffled([example(".x")] * 2, 3, seed=0))


class FakeEngine:
    """Gives token i of a row the log-prob -(row + 1) * (i + 1), in micro-batches of two rows."""

    def __init__(self) -> None:
        self.rates = iter([0.1, 0.2, 0.3])

    def next_rate(self) -> float:
        return next(self.rates)

    def train_step(
        self, sequences: Sequence[TokenSequence], rows: Sequence[int], loss: Loss
    ) -> StepResult:
        total = torch.zeros(())
        for start in range(0, len(rows), 2):
            part = torch.tensor(rows[start : start + 2])
            width = max(sequences[row].response_length for row in part.tolist())
            logprobs = -(part[:, None] + 1.0) * torch.arange(1, width + 1)
            for i, row in enumerate(part.tolist()):  # garbage behind the response
                logprobs[i, sequences[row].response_length :] = float("nan")
            total = total + loss(Forward(part, logprobs, torch.zeros_like(logprobs)))
        return StepResult(True, float(total), 1.5, torch.zeros(1), torch.zeros(1))


class Log:
    """The Recorder role, remembering."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps[step] = metrics

    def progress(self, note: str, done: int, total: int) -> None: ...


def test_the_loss_is_the_mean_over_learnt_tokens_of_the_whole_mini_batch() -> None:
    """Micro-batches of different sizes count by their tokens."""
    texts = [".xx.x", "..x", "..xxxx"]
    config = RunConfig.model_validate(
        {
            "run": {"folder": "unused", "seed": 1},
            "model": {"hf": "unused"},
            "data": {"train": "unused"},
            "sft": {"steps": 2, "mini_batch_size": 3},
        }
    )
    log = Log()
    engine: Any = FakeEngine()
    run(config, engine, [example(text) for text in texts], log)
    assert list(log.steps) == [1, 2]
    orders = islice(shuffled([example(text) for text in texts], 3, seed=1), 2)
    for step, order in enumerate(orders, start=1):
        learnt = [
            (row + 1) * (i + 1)
            for row, one in enumerate(order)
            for i, inside in enumerate(one.loss_mask[one.loss_mask.index(True) :])
            if inside
        ]
        assert len(learnt) == 8
        assert log.steps[step]["sft/loss"] == pytest.approx(sum(learnt) / 8)
    assert [m["sft/lr"] for m in log.steps.values()] == [0.1, 0.2]
    assert log.steps[1]["sft/grad_norm"] == 1.5
    rate = log.steps[1]["sft/tokens_per_s"] * log.steps[1]["time/step_s"]
    assert rate == pytest.approx(5 + 3 + 6)
