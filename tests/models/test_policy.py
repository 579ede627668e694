"""Which rows a policy scores before its update, and what stands in for the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_prime.config import PolicySection, PrecisionOptions, RunConfig
from megatron_prime.errors import NotFinite
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import (
    OldLogprobs,
    PolicyUpdate,
    RolloutBatch,
    ScoredBatch,
    TokenSequence,
    TrainBatch,
)

before_megatron_import()

from megatron_prime.models import guard  # noqa: E402
from megatron_prime.models.engine import Forward  # noqa: E402
from megatron_prime.models.mini_batch import MiniBatch, learning  # noqa: E402
from megatron_prime.models.policy import MegatronPolicy  # noqa: E402
from megatron_prime.models.training import StepResult  # noqa: E402

LENGTHS = [2, 1, 3, 3, 1, 2]
MASK = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
SKIP = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
SKIP |= {"debug": {"on_not_finite": "skip"}}


class StubEngine:
    """Row i's tokens have the log-prob -i - 1, and 0.5 more after each optimizer step."""

    precision = PrecisionOptions()

    def __init__(self, breaks: int = -1) -> None:
        self.steps, self.breaks, self.began = 0, breaks, 0
        self.scored: list[list[int]] = []  # prompts' first tokens
        self.trained: list[list[int]] = []
        self.losses: list[float] = []

    def next_rate(self) -> float:
        return 0.1

    def logprobs(self, sequences: tuple[TokenSequence, ...]) -> torch.Tensor:
        self.scored.append([sequence.token_ids[0] for sequence in sequences])
        return self._of(sequences)

    def _of(self, sequences: tuple[TokenSequence, ...]) -> torch.Tensor:
        lengths = torch.tensor([sequence.response_length for sequence in sequences])
        numbers = torch.tensor([float(sequence.token_ids[0]) for sequence in sequences])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return torch.where(mask, (-numbers - 1 + 0.5 * self.steps)[:, None], 0.0)

    def train_step(
        self, sequences: tuple[TokenSequence, ...], rows: list[int], loss: Any
    ) -> StepResult:
        self.began += 1
        if self.began - 1 == self.breaks:
            raise NotFinite("broken")
        self.trained.append(rows)
        found = self._of(sequences)
        width = max(LENGTHS[row] for row in rows)
        forward = Forward(torch.tensor(rows), found[rows, :width], torch.zeros(len(rows), width))
        self.losses.append(float(loss(forward)))
        self.steps += 1
        inside = torch.zeros_like(found)
        inside[rows] = found[rows]
        return StepResult(True, self.losses[-1], 1.0, inside, torch.zeros_like(found), 1.0)


def policy_and_batch(size: int, breaks: int = -1) -> tuple[MegatronPolicy, StubEngine, Any]:
    """Mini-batches of `size` of six rows; the engine's log-probs are 0.1 below the trainer's."""
    engine = StubEngine(breaks)
    keeper = guard.Guard(RunConfig.model_validate(SKIP), "policy")
    knobs = PolicySection.model_validate(
        {"mini_batch_size": size, "loss": {"importance": "token", "importance_cap": 5.0}}
    )
    given: Any = engine
    policy = MegatronPolicy(given, knobs, 0, keeper)
    sequences = tuple(TokenSequence((i,) * (1 + n), 1) for i, n in enumerate(LENGTHS))
    of_engine = torch.where(MASK, -torch.arange(6.0)[:, None] - 1.1, 0.0)
    return policy, engine, RolloutBatch(sequences, 2, MASK, torch.zeros(6), of_engine)


def update(policy: MegatronPolicy, rollouts: RolloutBatch, old: OldLogprobs) -> PolicyUpdate:
    """With advantages of 1."""
    return policy.update(TrainBatch(ScoredBatch(rollouts, old, None), None, MASK.float()))


BEFORE = torch.where(MASK, -torch.arange(6.0)[:, None] - 1, 0.0)
WEIGHT = float(torch.tensor(0.1).exp())  # trainer over engine


def test_an_update_of_one_mini_batch_scores_nothing() -> None:
    policy, engine, rollouts = policy_and_batch(size=6)
    found = update(policy, rollouts, policy.old_logprobs(rollouts))
    assert engine.scored == []
    assert torch.equal(found.old_logprobs, BEFORE)
    assert found.metrics["policy/ratio_max"] == 1.0
    assert found.metrics["policy/approx_kl"] == 0.0
    assert found.metrics["policy/importance_mean"] == pytest.approx(WEIGHT)
    assert engine.losses == pytest.approx([-WEIGHT]), "weighted, though nothing was scored"


def test_of_several_mini_batches_all_but_the_first_are_scored() -> None:
    policy, engine, rollouts = policy_and_batch(size=2)
    found = update(policy, rollouts, policy.old_logprobs(rollouts))
    first, *later = engine.trained
    behind = sorted(row for rows in later for row in rows)
    assert sorted(first + behind) == list(range(6))
    assert [sorted(rows) for rows in engine.scored] == [behind]
    torch.testing.assert_close(found.old_logprobs, BEFORE)
    # The steps before have raised all log-probs by 0, 0.5 and 1; beyond 1.2 the ratio is cut.
    assert engine.losses == pytest.approx([-WEIGHT, -1.2 * WEIGHT, -1.2 * WEIGHT])
    assert found.metrics["policy/ratio_max"] == pytest.approx(float(torch.tensor(1.0).exp()))


def test_a_first_mini_batch_that_was_skipped_is_scored_by_a_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard.Guard, "_told", lambda *_: "kept")
    monkeypatch.setattr(guard.dist, "get_rank", lambda: 0)
    policy, engine, rollouts = policy_and_batch(size=3, breaks=0)
    found = update(policy, rollouts, policy.old_logprobs(rollouts))
    assert len(engine.scored) == 2
    assert sorted(engine.scored[0] + engine.scored[1]) == list(range(6))
    assert torch.equal(found.old_logprobs, BEFORE)
    assert found.metrics["policy/not_finite_steps"] == 1


def test_old_logprobs_of_another_order_are_refused() -> None:
    """Each version shuffles anew."""
    policy, engine, rollouts = policy_and_batch(size=3)
    old = policy.old_logprobs(rollouts)
    update(policy, rollouts, old)
    with pytest.raises(ValueError, match=r"found \d rows without old log-probs behind the first"):
        update(policy, rollouts, old)
    assert engine.steps == 2, "refused before it trained"


@pytest.mark.parametrize("aggregation", ["seq_mean_token_mean", "token_mean"])
def test_truncated_responses_have_no_loss_but_stay_in_the_batch(aggregation: str) -> None:
    """The loss is that of the others alone, however the mini-batch is cut into packs."""
    policy, engine, rollouts = policy_and_batch(size=6)
    loss = policy.knobs.loss.model_copy(update={"aggregation": aggregation})
    policy.knobs = policy.knobs.model_copy(update={"loss": loss})
    cut = torch.tensor([False, True, False, False, True, False])
    advantages = torch.where(cut[:, None], 1e6, torch.arange(1.0, 7.0)[:, None]) * MASK
    rollouts = replace(rollouts, learns=~cut)
    batch = TrainBatch(ScoredBatch(rollouts, policy.old_logprobs(rollouts), None), None, advantages)
    found = policy.update(batch)
    lengths, others = torch.tensor(LENGTHS), [0, 2, 3, 5]
    weights = lengths[others] if aggregation == "token_mean" else torch.ones(4)
    mean = float((torch.tensor([1.0, 3.0, 4.0, 6.0]) * weights).sum() / weights.sum())
    assert engine.losses == pytest.approx([-mean * WEIGHT])
    assert found.metrics["policy/loss"] == pytest.approx(-mean * WEIGHT)
    assert found.metrics["policy/masked"] == pytest.approx(2 / 6)
    assert torch.equal(found.old_logprobs, BEFORE), "of all rows"

    part = MiniBatch.of(rollouts, learning(rollouts, torch.arange(6)))
    assert (part.rollouts, part.tokens) == (4, int(lengths[others].sum()))
    shares = []
    for rows in ([0, 1], [4], [2, 3, 5]):
        logprobs = BEFORE[rows].requires_grad_()
        forward = Forward(torch.tensor(rows), logprobs, torch.zeros(len(rows), 3))
        shares.append(policy.loss_of(batch, part)(forward))
        shares[-1].backward()
        assert logprobs.grad is not None
        assert not logprobs.grad[cut[rows]].any()
        assert logprobs.grad[~cut[rows]].any() == (rows != [4])
    assert torch.stack(shares).sum().item() == pytest.approx(-mean * WEIGHT)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_mini_batch_of_truncated_responses_alone_takes_no_step(number: int) -> None:
    """Momentum and weight decay would move the weights."""
    policy, engine, rollouts = policy_and_batch(size=2)
    parts = torch.randperm(6, generator=torch.Generator().manual_seed(0)).split(2)
    learns = torch.ones(6, dtype=torch.bool)
    learns[parts[number]] = False
    rollouts = replace(rollouts, learns=learns)
    found = update(policy, rollouts, policy.old_logprobs(rollouts))
    trained = [rows.tolist() for i, rows in enumerate(parts) if i != number]
    assert engine.trained == trained
    # A step raises log-probs by 0.5, and beyond a ratio of 1.2 the loss is cut.
    assert engine.losses == pytest.approx([-WEIGHT, -1.2 * WEIGHT])
    assert found.metrics["policy/masked"] == pytest.approx(1 / 3)
    assert found.metrics["policy/loss"] == pytest.approx(-1.1 * WEIGHT)
    torch.testing.assert_close(found.old_logprobs, BEFORE)
