"""Which rows a critic learns from, and what it is judged by, on an engine that computes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_prime.config import CriticSection, PrecisionOptions, RunConfig
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import Metrics, RolloutBatch, TokenSequence
from megatron_prime.value_batch import ValueBatch

before_megatron_import()

from megatron_prime.models.critic import MegatronCritic  # noqa: E402
from megatron_prime.models.engine import Forward  # noqa: E402
from megatron_prime.models.guard import Guard  # noqa: E402
from megatron_prime.models.training import StepResult  # noqa: E402

LENGTHS = [2, 1, 3, 3, 1, 2]
MASK = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
RETURNS = torch.arange(18.0).view(6, 3).cos() * MASK
NOTHING = torch.zeros(6, 3)
TO_COME = torch.arange(18.0).view(6, 3).sin() * MASK


class StubEngine:
    """Expects 0.25 of everything, whatever it learns."""

    precision = PrecisionOptions()

    def __init__(self) -> None:
        self.trained: list[list[int]] = []
        self.losses: list[float] = []

    def next_rate(self) -> float:
        return 0.1

    def train_step(
        self, sequences: tuple[TokenSequence, ...], rows: list[int], loss: Any
    ) -> StepResult:
        self.trained.append(rows)
        values = torch.where(MASK, 0.25, 0.0)
        micro_batches = [rows[:1], rows[1:]]  # the loss is a sum over them
        self.losses.append(
            sum(
                float(loss(Forward(torch.tensor(part), values[part], values[part])))
                for part in micro_batches
            )
        )
        return StepResult(True, self.losses[-1], 1.0, values, torch.zeros(6, 3), 1.0)


def updated(
    learns: torch.Tensor | None, size: int, expected: torch.Tensor = NOTHING
) -> tuple[StubEngine, Metrics]:
    engine = StubEngine()
    given: Any = engine
    config = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
    keeper = Guard(RunConfig.model_validate(config), "critic")
    critic = MegatronCritic(given, CriticSection(mini_batch_size=size), keeper)
    sequences = tuple(TokenSequence((i,) * (1 + n), 1) for i, n in enumerate(LENGTHS))
    rollouts = RolloutBatch(sequences, 2, MASK, torch.zeros(6), NOTHING, learns)
    return engine, critic.update(ValueBatch(rollouts, expected, RETURNS, TO_COME))


def test_rows_that_are_not_learnt_from_have_no_loss_and_no_figures() -> None:
    learns = torch.tensor([False, True, True, False, True, True])
    engine, metrics = updated(learns, size=6)
    inside = MASK & learns[:, None]
    wanted = float((0.25 - RETURNS[inside]).square().mean()) / 2
    assert engine.losses == pytest.approx([wanted])
    assert metrics["critic/return_mean"] == pytest.approx(float(RETURNS[inside].mean()))
    assert engine.trained == [[0, 1, 2, 3, 4, 5]]


def test_a_mini_batch_without_a_loss_takes_no_step() -> None:
    learns = torch.tensor([True, True, False, False, True, True])
    engine, metrics = updated(learns, size=2)
    assert engine.trained == [[0, 1], [4, 5]]
    assert metrics["critic/loss"] == pytest.approx(sum(engine.losses) / 2)


def test_it_is_judged_by_rewards_to_come_and_not_by_returns_that_have_its_values_in_them() -> None:
    _, constant = updated(None, size=6)
    assert constant["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    _, metrics = updated(None, size=6, expected=RETURNS)
    wanted = 1 - float((TO_COME - RETURNS)[MASK].var() / TO_COME[MASK].var())
    assert metrics["critic/explained_variance"] == pytest.approx(wanted, abs=1e-5)
    assert wanted < 0
