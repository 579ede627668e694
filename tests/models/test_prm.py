"""What a PRM update makes of a mini-batch that was skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_precision import RoundingEngine, fp8

from megatron_prime.config import PrecisionOptions, PrmSection, RunConfig
from megatron_prime.errors import NotFinite
from megatron_prime.models import guard
from megatron_prime.models.prm import MegatronPrm
from megatron_prime.models.training import StepResult
from megatron_prime.types import (
    OldLogprobs,
    PrmUpdate,
    RolloutBatch,
    ScoredBatch,
    TokenSequence,
)

LENGTHS = torch.tensor([2, 1, 3, 3])
SKIP = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
SKIP |= {"debug": {"on_not_finite": "skip"}}


class BreakingEngine(RoundingEngine):
    """The training forward of one mini-batch is not finite; every other forward is."""

    def __init__(self, options: PrecisionOptions, breaks: int) -> None:
        super().__init__(options)
        self.breaks = breaks

    def train_step(self, sequences: Any, rows: list[int], loss: Any) -> StepResult:
        if rows[0] == 2 * self.breaks:
            raise NotFinite("broken")
        return super().train_step(sequences, rows, loss)


def update(monkeypatch: pytest.MonkeyPatch, options: PrecisionOptions, breaks: int) -> PrmUpdate:
    """An update of mini-batches of two: responses of 2 and 1 tokens, then of 3 and 3."""
    monkeypatch.setattr(guard.Guard, "_told", lambda *_: "kept")
    monkeypatch.setattr(guard.dist, "get_rank", lambda: 0)
    sequences = tuple(TokenSequence((5,) * (1 + n), 1) for n in LENGTHS.tolist())
    mask = torch.arange(3) < LENGTHS[:, None]
    batch = RolloutBatch(sequences, 2, mask, torch.zeros(4), torch.zeros(4, 3))
    keeper = guard.Guard(RunConfig.model_validate(SKIP), "prm")
    engine: Any = BreakingEngine(options, breaks)
    prm = MegatronPrm(engine, PrmSection(mini_batch_size=2), keeper)
    return prm.update(ScoredBatch(batch, OldLogprobs.none(batch), torch.full((4, 3), -9.0)))


@pytest.mark.parametrize("breaks", [0, 1])
def test_rows_of_a_skipped_mini_batch_are_scored_by_a_forward(
    monkeypatch: pytest.MonkeyPatch, breaks: int
) -> None:
    """Not by the reference's log-probs, whose reward of 0 is no neutral one."""
    found = update(monkeypatch, PrecisionOptions(), breaks)
    mask = torch.arange(3) < LENGTHS[:, None]
    assert (found.forward_logprobs[mask] == -1.0).all()
    assert found.metrics["prm/not_finite_steps"] == 1


@pytest.mark.parametrize(("breaks", "reported"), [(0, False), (1, True)])
def test_fp8s_error_is_left_out_when_its_mini_batch_was_skipped(
    monkeypatch: pytest.MonkeyPatch, breaks: int, reported: bool
) -> None:
    found = update(monkeypatch, fp8("tensorwise"), breaks)
    assert ("prm/fp8_logprob_error" in found.metrics) == reported
