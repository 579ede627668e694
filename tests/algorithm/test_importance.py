from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.algorithm.importance import importance_metrics, importance_weights
from megatron_prime.algorithm.policy_loss import PolicyLossOptions, clipped_policy_loss

LEVELS = ["token", "sequence"]


@pytest.fixture
def engine(golden):
    """The engine's log-probs: near the trainer's, now above them and now below."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(golden.old.shape, generator=generator, dtype=torch.float64)
    return golden.old + 0.4 * noise


def by_hand(old, engine, mask, level, cap):
    """Probabilities multiplied one by one; no logarithm is summed, no tensor used."""
    rows = []
    for o, e, m in zip(old.tolist(), engine.tolist(), mask.tolist(), strict=True):
        ratios = [
            math.exp(a) / math.exp(b) if inside else 0 for a, b, inside in zip(o, e, m, strict=True)
        ]
        if level == "sequence":
            product = math.prod(r for r, inside in zip(ratios, m, strict=True) if inside)
            ratios = [product * inside for inside in m]
        rows.append([r if r < cap else cap for r in ratios])
    return rows


@pytest.mark.parametrize("cap", [0.7, 1.3, 50.0])
@pytest.mark.parametrize("level", LEVELS)
def test_weights_are_ratios_of_probabilities_cut_at_the_cap(golden, engine, level, cap):
    found = importance_weights(golden.old, engine, golden.mask, level, cap)
    rows = by_hand(golden.old, engine, golden.mask, level, cap)
    wanted = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert (found == cap).any() == (cap < 50), "the cap is told apart"


@pytest.mark.parametrize(
    ("level", "wanted"),
    [("token", [[2.0, 0.5, 0.25], [1.0, 1.0, 0.0]]), ("sequence", [[0.5] * 3, [1.0, 1.0, 0.0]])],
)
def test_two_responses_by_hand(level, wanted):
    """The trainer finds tokens 4, 1/2 and 1/4 times as likely; the cap is 2."""
    gap = torch.tensor([[4.0, 0.5, 0.25], [1.0, 1.0, 1.0]]).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = importance_weights(gap - 3, torch.full((2, 3), -3.0), mask, level, 2.0)
    torch.testing.assert_close(found, torch.tensor(wanted))
    figures = importance_metrics(gap - 3, torch.full((2, 3), -3.0), mask, level, 2.0)
    assert figures == {
        "importance_mean": pytest.approx({"token": 4.75 / 5, "sequence": 0.75}[level]),
        "importance_truncated": pytest.approx({"token": 1 / 5, "sequence": 0.0}[level]),
    }


@pytest.mark.parametrize("level", LEVELS)
def test_figures_count_tokens_or_responses(golden, engine, level):
    cap = 1.1
    found = importance_metrics(golden.old, engine, golden.mask, level, cap)
    rows = by_hand(golden.old, engine, golden.mask, level, math.inf)
    if level == "token":
        ratios = torch.tensor(rows)[golden.mask].tolist()
    else:
        ratios = [max(row) for row in rows]  # all of a row's tokens have the same
    cut = [min(ratio, cap) for ratio in ratios]
    assert found["importance_mean"] == pytest.approx(sum(cut) / len(cut), rel=1e-6)
    assert found["importance_truncated"] == sum(r > cap for r in ratios) / len(ratios)
    assert 0 < found["importance_truncated"] < 1


@pytest.mark.parametrize("level", LEVELS)
def test_an_engine_that_agrees_changes_nothing(golden, level):
    weights = importance_weights(golden.old, golden.old.clone(), golden.mask, level, 2.0)
    assert torch.equal(weights, golden.mask.double())


@pytest.mark.parametrize("level", LEVELS)
def test_enormous_ratios_are_the_cap_and_tiny_ones_0(level):
    old, mask = torch.tensor([[800.0], [-800.0]]), torch.ones(2, 1).bool()
    found = importance_weights(old, torch.zeros(2, 1), mask, level, 2.0)
    assert found.tolist() == [[2.0], [0.0]]


def loss_and_gradient(golden, rows, weights=None, old=None):
    new = golden.new[rows].clone().requires_grad_()
    loss = clipped_policy_loss(
        new,
        golden.old[rows] if old is None else old,
        golden["rloo.released.advantage"][rows],
        golden.mask[rows],
        PolicyLossOptions(),
        weights,
    )
    loss.backward()
    return loss.detach(), new.grad


@pytest.mark.parametrize("level", LEVELS)
def test_each_tokens_loss_and_gradient_are_multiplied(golden, engine, level):
    weights = importance_weights(golden.old, engine, golden.mask, level, 1.3)
    everything = slice(None)
    loss, gradient = loss_and_gradient(golden, everything, weights)
    torch.testing.assert_close(gradient, loss_and_gradient(golden, everything)[1] * weights)
    advantage = golden["rloo.released.advantage"].tolist()
    total = 0.0
    for i, tokens in enumerate(golden.mask.sum(dim=1).tolist()):
        for t in range(tokens):
            ratio = math.exp(golden.new[i, t] - golden.old[i, t])
            a, clipped = advantage[i][t], min(max(ratio, 0.8), 1.2)
            total += weights[i, t].item() * max(-a * ratio, -a * clipped) / tokens / 8
    assert loss.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_passes_through_the_weights(golden, engine, level):
    """Not even when the trainer's old log-probs are the very tensor that is trained."""
    new = golden.old.clone().requires_grad_()
    weights = importance_weights(new, engine, golden.mask, level, 1.3)
    assert not weights.requires_grad
    free = torch.ones_like(new).requires_grad_()
    advantages = golden["rloo.released.advantage"]
    clipped_policy_loss(new, new, advantages, golden.mask, PolicyLossOptions(), free).backward()
    assert free.grad is None


@pytest.mark.parametrize("sizes", [[1, 7], [3, 3, 2]])
@pytest.mark.parametrize("level", LEVELS)
def test_a_split_mini_batch_has_the_same_weights_and_loss(golden, engine, level, sizes):
    whole = importance_weights(golden.old, engine, golden.mask, level, 1.3)
    total, gradient = 0.0, torch.zeros_like(golden.new)
    for rows in torch.arange(8).split(sizes):
        part = importance_weights(golden.old[rows], engine[rows], golden.mask[rows], level, 1.3)
        assert torch.equal(part, whole[rows])
        loss, gradient[rows] = loss_and_gradient(golden, rows, part)
        total += loss * len(rows) / 8
        gradient[rows] *= len(rows) / 8
    wanted = loss_and_gradient(golden, slice(None), whole)
    torch.testing.assert_close(total, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, wanted[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_padding_counts_for_nothing(golden, engine, spoil, widen, level):
    wanted = importance_weights(golden.old, engine, golden.mask, level, 1.3)
    spoiled = [spoil(values, golden.mask) for values in (golden.old, engine)]
    assert torch.equal(importance_weights(*spoiled, golden.mask, level, 1.3), wanted)
    wide = importance_weights(widen(golden.old), widen(engine), widen(golden.mask), level, 1.3)
    assert torch.equal(wide[:, :7], wanted)
    assert not wide[:, 7:].any()
    figures = importance_metrics(*spoiled, golden.mask, level, 1.3)
    assert figures == importance_metrics(golden.old, engine, golden.mask, level, 1.3)
    loss, gradient = loss_and_gradient(golden, slice(None), spoil(wanted, golden.mask))
    clean = loss_and_gradient(golden, slice(None), wanted)
    assert torch.equal(loss, clean[0])
    assert torch.equal(gradient, clean[1])


def test_the_expectation_under_the_engine_is_the_trainers():
    """Why: E over the engine's samples of w f is E over the trainer's of f, if nothing is cut."""
    trainer, engine = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    values = torch.tensor([1.0, -2.0, 5.0]).double()
    mask = torch.ones(3, 1).bool()
    weights = importance_weights(trainer.log()[:, None], engine.log()[:, None], mask, "token", 9.0)
    assert (engine * weights[:, 0] * values).sum() == pytest.approx(float((trainer * values).sum()))


@pytest.mark.parametrize("index", [0, 1])
def test_a_tensor_of_another_shape_is_named(golden, engine, index):
    inputs = [golden.old, engine]
    inputs[index] = inputs[index][:, :5]
    name = ["old_logprobs", "rollout_logprobs"][index]
    with pytest.raises(ValueError, match=rf"^{name}: found shape \[8, 5\], wanted \[8, 7\]"):
        importance_weights(*inputs, golden.mask, "token", 2.0)
