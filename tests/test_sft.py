"""Fine-tuning: what is learnt of a conversation, and the loss by value."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prime.config import RunConfig
from megatron_prime.data.epochs import Epochs
from megatron_prime.data.sft_data import SftExample, fingerprint
from megatron_prime.models.engine import Forward, Loss
from megatron_prime.models.training import StepResult
from megatron_prime.sft import as_sequences, run
from megatron_prime.stage_steps import StageSteps
from megatron_prime.types import LoopState, TokenSequence

CONFIG = RunConfig.model_validate(
    {"run": {"folder": "unused"}, "model": {"hf": "unused"}, "data": {"train": "unused"}}
)


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


class FakeEngine:
    """Gives token i of a row the log-prob -(row + 1) * (i + 1), in micro-batches of two rows."""

    def __init__(self) -> None:
        self.rates = iter([0.1, 0.2, 0.3])
        self.grid = SimpleNamespace(dp_size=2, multiple=1)

    def next_rate(self) -> float:
        return next(self.rates)

    def logprobs(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """The same, of all rows; refuses a number of rows that two ranks can't share."""
        assert len(sequences) % 2 == 0
        width = max(s.response_length for s in sequences)
        return -(torch.arange(len(sequences))[:, None] + 1.0) * torch.arange(1, width + 1)

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


class Everyone:
    """Recorder, Checkpoints and StopSignals; remembers what is logged."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps[step] = metrics

    def save(self, state: LoopState) -> None: ...

    def asked(self) -> None: ...


def epochs(examples: Sequence[SftExample]) -> Epochs[SftExample]:
    return Epochs(examples, 3, 1, fingerprint, "conversations, wanted at least")


def fine_tune(
    texts: Sequence[str], held_out: Sequence[str] = (), done: int = 0
) -> dict[int, dict[str, float]]:
    """Two steps of three conversations; what was logged."""
    everyone: Any = Everyone()
    engine: Any = FakeEngine()
    steps = StageSteps(done, 2, 0, 2, everyone, everyone, everyone)
    run(CONFIG, engine, epochs([*map(example, texts)]), [*map(example, held_out)], steps)
    return dict(everyone.steps)


def test_the_loss_is_the_mean_over_learnt_tokens_of_the_whole_mini_batch() -> None:
    """Micro-batches of different sizes count by their tokens."""
    texts = [".xx.x", "..x", "..xxxx"]
    logged = fine_tune(texts)
    assert list(logged) == [0, 1, 2]
    order_of = epochs([example(text) for text in texts])
    for step in (1, 2):
        learnt = [
            (row + 1) * (i + 1)
            for row, one in enumerate(order_of.take())
            for i, inside in enumerate(one.loss_mask[one.loss_mask.index(True) :])
            if inside
        ]
        assert len(learnt) == 8
        assert logged[step]["sft/loss"] == pytest.approx(sum(learnt) / 8)
    assert [logged[step]["sft/lr"] for step in (1, 2)] == [0.1, 0.2]
    assert [logged[step]["sft/epoch"] for step in (1, 2)] == [1, 2]
    assert logged[1]["sft/grad_norm"] == 1.5
    rate = logged[1]["sft/tokens_per_s"] * logged[1]["time/step_s"]
    assert rate == pytest.approx(5 + 3 + 6)


def test_held_out_conversations_are_judged_at_the_start_and_the_end() -> None:
    """Over their own assistant tokens, by a forward that needs rows in multiples of two."""
    logged = fine_tune([".x"] * 3, held_out=[".xx.x", "..x", ".x"])
    wanted = (1 + 2 + 4 + 2 * 1 + 3 * 1) / 5
    assert logged[0] == {"held_out/loss": pytest.approx(wanted)}
    assert "held_out/loss" not in logged[1]
    assert logged[2]["held_out/loss"] == pytest.approx(wanted)


def test_a_continued_run_does_only_what_is_left() -> None:
    assert list(fine_tune([".x"] * 3, held_out=[".x"], done=1)) == [2]
