"""Offline PRM training: what one step learns, by value, and what the held-out figures say."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prime import figures
from megatron_prime.config import PrmSection, RunConfig
from megatron_prime.data.epochs import Epochs
from megatron_prime.data.labelled import LabelledGroup, as_batch, fingerprint
from megatron_prime.stage_steps import StageSteps
from megatron_prime.train_prm import judge, run, score
from megatron_prime.types import OldLogprobs, PrmUpdate, RolloutBatch, ScoredBatch

CONFIG = RunConfig.model_validate(
    {
        "run": {"folder": "unused"},
        "model": {"hf": "unused"},
        "data": {"train": "unused"},
        "prm": {"beta": 0.5},
    }
)
GROUPS = [
    LabelledGroup((1,), ((5, 6), (7,)), (1.0, 0.0)),
    LabelledGroup((2,), ((5,), (8, 8, 8)), (0.0, 0.5)),
    LabelledGroup((3,), ((9,), (9, 9)), (1.0, 1.0)),
]


def by_token(batch: RolloutBatch, scale: float) -> torch.Tensor:
    """A model whose log-prob of token t is -t * scale."""
    found = torch.zeros(batch.response_mask.shape)
    for row, s in enumerate(batch.sequences):
        ids = torch.tensor(s.token_ids[s.prompt_length :])
        found[row, : len(ids)] = -scale * ids
    return found


class Prm:
    """The PRM's role; learns nothing, and remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[ScoredBatch] = []
        self.engine = SimpleNamespace(grid=SimpleNamespace(dp_size=2, multiple=1))
        self.engine.logprobs = lambda sequences: by_token(
            SimpleNamespace(  # type: ignore[arg-type]
                sequences=sequences,
                response_mask=torch.zeros(
                    len(sequences), max(s.response_length for s in sequences)
                ),
            ),
            1.0,
        )

    def update(self, batch: ScoredBatch) -> PrmUpdate:
        self.seen.append(batch)
        return PrmUpdate(by_token(batch.rollouts, 1.0), {"prm/loss": 0.25})


class Reference:
    def logprobs(self, batch: RolloutBatch) -> torch.Tensor:
        return by_token(batch, 1.1)


class Everyone:
    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged[step] = metrics

    def save(self, state: Any) -> None: ...

    def asked(self) -> None: ...


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# R = 0.5 * 0.1 * (sum of the tokens)
REWARDS = [[0.55, 0.35], [0.25, 1.2], [0.45, 0.9]]


def held_out(groups: list[LabelledGroup]) -> ScoredBatch:
    rollouts = as_batch(groups)
    return ScoredBatch(rollouts, OldLogprobs.none(rollouts), by_token(rollouts, 1.1))


def test_a_step_is_an_update_on_a_mini_batch_with_the_references_log_probs() -> None:
    prm: Any = Prm()
    everyone: Any = Everyone()
    groups = Epochs(GROUPS, 2, 3, fingerprint, "groups, wanted at least")
    order = Epochs(GROUPS, 2, 3, fingerprint, "groups, wanted at least")
    steps = StageSteps(0, 2, 0, 1, everyone, everyone, everyone)
    run(CONFIG, prm, Reference(), groups, None, steps)
    assert list(everyone.logged) == [0, 1, 2]
    assert everyone.logged[0] == {}
    for step, batch in enumerate(prm.seen, start=1):
        taken = order.take()
        assert batch.rollouts.sequences == as_batch(taken).sequences
        assert batch.rollouts.outcome_rewards.tolist() == [x for g in taken for x in g.labels]
        assert batch.rollouts.group_size == 2
        assert torch.equal(batch.ref_logprobs, by_token(batch.rollouts, 1.1))
        rewards = [r for g in taken for r in REWARDS[GROUPS.index(g)]]
        found = everyone.logged[step]
        wanted = sum(map(sigma, rewards)) / 4
        assert found["prm/predicted_accuracy"] == pytest.approx(wanted, abs=1e-6)
        assert found["prm/loss"] == 0.25
        assert "prm/staleness" not in found, "there is no policy"


def test_held_out_groups_are_judged_by_loss_order_and_calibration() -> None:
    """Both groups of different labels are ordered right; the third has none to order."""
    found = judge(CONFIG, Prm(), held_out(GROUPS))  # type: ignore[arg-type]
    pairs = [
        (r, o)
        for rs, g in zip(REWARDS, GROUPS, strict=True)
        for r, o in zip(rs, g.labels, strict=True)
    ]
    loss = -sum(o * math.log(sigma(r)) + (1 - o) * math.log(sigma(-r)) for r, o in pairs) / 6
    assert found["held_out/loss"] == pytest.approx(loss, abs=1e-6)
    assert found["held_out/pair_accuracy"] == 1.0
    right = [r for r, o in pairs if o == 1]
    assert found["held_out/reward_right_mean"] == pytest.approx(sum(right) / 3, abs=1e-6)
    gap = sum(sigma(r) - o for r, o in pairs) / 6
    assert found["held_out/over_optimisation_gap"] == pytest.approx(gap, abs=1e-6)
    assert judge(CONFIG, Prm(), None) == {}  # type: ignore[arg-type]


def test_an_order_that_is_wrong_counts_by_the_difference_of_labels() -> None:
    wrong = [LabelledGroup((1,), ((5, 6), (7,)), (0.0, 1.0)), GROUPS[1]]
    scored = held_out(wrong)
    logprobs = by_token(scored.rollouts, 1.0)
    found = figures.of_held_out(PrmSection(beta=0.5), scored, logprobs)
    assert found["held_out/pair_accuracy"] == 0.5, "a mean over groups"
    equal = figures.of_held_out(
        PrmSection(beta=0.5), held_out(GROUPS[2:]), by_token(as_batch(GROUPS[2:]), 1.0)
    )
    assert "held_out/pair_accuracy" not in equal


def test_a_step_without_a_pair_has_no_pair_accuracy() -> None:
    """Not 0.5: nothing was ordered. (`rollout.group_size = 1` has no pair in any step.)"""
    alone = [LabelledGroup((1,), ((5, 6),), (1.0,)), LabelledGroup((2,), ((5,),), (0.0,))]
    for groups in (alone, GROUPS[2:]):
        scored = held_out(groups)
        logprobs = by_token(scored.rollouts, 1.0)
        found = figures.of_prm_rewards(0.5, scored, logprobs, logprobs)
        assert not [name for name in found if "pair_accuracy" in name]
        assert "prm/predicted_accuracy" in found
    scored = held_out(GROUPS)
    found = figures.of_prm_rewards(0.5, scored, by_token(scored.rollouts, 1.0))
    assert found["prm/pair_accuracy_before"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_the_loss_of_pairs_is_that_of_all_held_out_pairs() -> None:
    scored = held_out(GROUPS)
    knobs = PrmSection(beta=0.5, loss="dpo")
    found = figures.of_held_out(knobs, scored, by_token(scored.rollouts, 1.0))
    loss = -(math.log(sigma(0.55 - 0.35)) + math.log(sigma(1.2 - 0.25))) / 2
    assert found["held_out/loss"] == pytest.approx(loss, abs=1e-6)


def test_no_policy_has_scored_anything() -> None:
    batch = score(Reference(), GROUPS)
    assert not batch.old_logprobs.known.any()
