"""Which loss scale a replay takes, and what it says of an overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_prime.errors import NotFinite
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import RolloutBatch, TokenSequence

before_megatron_import()

from megatron_prime.models.guard import Kept  # noqa: E402
from megatron_prime.models.training import StepResult, TrainableEngine  # noqa: E402
from megatron_prime.replay import run_again  # noqa: E402
from megatron_prime.sft import FineTuning  # noqa: E402

BATCH = RolloutBatch(
    (TokenSequence((5, 6, 7), 1),),
    1,
    torch.tensor([[True, True]]),
    torch.zeros(1),
    torch.zeros(1, 2),
)


class Scaled(TrainableEngine):
    """Overflows above a loss scale of 100; `scale` None: it has no scale that adapts."""

    def __init__(self, scale: float | None) -> None:
        self.scale = scale

    @property
    def loss_scale(self) -> float | None:
        return self.scale

    def set_loss_scale(self, scale: float) -> None:
        assert self.scale is not None
        self.scale = scale

    def train_step(self, sequences: Any, rows: Any, loss: Any) -> StepResult:
        scale = 1.0 if self.scale is None else self.scale
        found = torch.full((1, 2), -0.5)
        return StepResult(scale < 100, 0.25, 2.0, found, found, scale)


@pytest.mark.parametrize(("of_run", "own"), [(4.0, 65536.0), (None, 64.0), (4.0, None)])
def test_a_replay_takes_the_loss_scale_of_the_run(of_run: float | None, own: float | None) -> None:
    engine = Scaled(own)
    told = run_again(FineTuning(engine), Kept("sft", BATCH, of_run))
    assert told == "loss 0.25, gradient norm 2, 2 log-probs from -0.5 to -0.5"
    assert engine.scale == (own if own is None or of_run is None else of_run)


def test_an_overflow_is_not_called_finite() -> None:
    with pytest.raises(NotFinite, match="overflow at the loss scale 256, which may still fall"):
        run_again(FineTuning(Scaled(65536.0)), Kept("sft", BATCH, 256.0))
