from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.prm_loss import Tangent, prm_ce_loss, sequence_loss


def loss_and_gradient(prm, ref, mask, outcomes, beta):
    prm = prm.clone().requires_grad_()
    loss = prm_ce_loss(prm, ref, mask, outcomes, beta)
    loss.backward()
    return loss.detach(), prm.grad


def arguments(vectors, rows=slice(None)):
    tensors = (vectors.prm, vectors.ref, vectors.mask, vectors.outcomes)
    return *(tensor[rows] for tensor in tensors), vectors.beta


def test_value_and_gradient(vectors):
    loss, gradient = loss_and_gradient(*arguments(vectors))
    torch.testing.assert_close(loss, vectors["ce.loss"], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, vectors["ce.grad_logp_phi"], rtol=0, atol=1e-10)


def test_value_of_each_response(vectors):
    for row, wanted in enumerate(vectors["ce.per_sample"]):
        loss = prm_ce_loss(*arguments(vectors, slice(row, row + 1)))
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)


def test_value_of_each_mini_batch(vectors):
    losses = [prm_ce_loss(*arguments(vectors, rows)) for rows in (slice(0, 4), slice(4, 8))]
    wanted = vectors["ce.minibatch_order"]
    torch.testing.assert_close(torch.stack(losses), wanted, rtol=0, atol=1e-10)


def test_gradient_agrees_with_finite_differences(golden):
    prm = golden.prm.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prm_ce_loss(x, *arguments(golden)[1:]), prm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confident_prm_keeps_its_gradient(golden, dtype):
    for logit, loss_right, loss_wrong, slope_right, slope_wrong in golden["ce.saturation"]:
        for label, wanted, slope in (
            (1.0, loss_right, slope_right),
            (0.0, loss_wrong, slope_wrong),
        ):
            loss, gradient = loss_and_gradient(
                logit.to(dtype).reshape(1, 1), torch.zeros(1, 1, dtype=dtype),
                torch.ones(1, 1).bool(), torch.tensor([label]), 1.0,
            )  # fmt: skip
            torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-30)
            torch.testing.assert_close(gradient.double().squeeze(), slope, rtol=1e-6, atol=1e-16)


def test_garbage_on_padding_changes_neither_value_nor_gradient(golden, spoil):
    prm, ref, mask, outcomes, beta = arguments(golden)
    found = loss_and_gradient(spoil(prm, mask), spoil(ref, mask), mask, outcomes, beta)
    for a, b in zip(found, loss_and_gradient(*arguments(golden)), strict=True):
        assert torch.equal(a, b)


def test_more_padding_changes_nothing(golden, widen):
    prm, ref, mask, outcomes, beta = arguments(golden)
    loss, gradient = loss_and_gradient(widen(prm), widen(ref), widen(mask), outcomes, beta)
    wanted_loss, wanted_gradient = loss_and_gradient(*arguments(golden))
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradient[:, :7], wanted_gradient)
    assert gradient[:, 7:].abs().max() == 0


@pytest.mark.parametrize("sizes", [[1, 7], [3, 3, 2], [4, 4], [1] * 8])
def test_micro_batches_weighted_with_their_rows_sum_to_the_whole(golden, sizes):
    prm = golden.prm.clone().requires_grad_()
    parts = torch.arange(8).split(sizes)
    for rows in parts:
        loss = prm_ce_loss(prm[rows], *(x[rows] for x in arguments(golden)[1:4]), golden.beta)
        (loss * len(rows) / 8).backward()
    torch.testing.assert_close(prm.grad, golden["ce.grad_logp_phi"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precisions_are_computed_in_float32(golden, dtype):
    prm, ref, mask, outcomes, beta = arguments(golden)
    prm, ref = prm.to(dtype), ref.to(dtype)
    loss, gradient = loss_and_gradient(prm, ref, mask, outcomes.float(), beta)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    wanted = prm_ce_loss(prm.double(), ref.double(), mask, outcomes, beta)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def test_float64_log_probs_with_float32_outcomes_stay_float64(golden):
    prm, ref, mask, _, beta = arguments(golden)
    binary = (golden.outcomes > 0.5).float()
    loss = prm_ce_loss(prm, ref, mask, binary, beta)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(
        loss, prm_ce_loss(prm, ref, mask, binary.double(), beta), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("value", [-1.0, 1.5, float("nan")])
def test_outcomes_outside_0_to_1_are_refused(golden, value):
    outcomes = golden.outcomes.clone()
    outcomes[3] = value
    with pytest.raises(ValueError, match=r"outcome_rewards: found values .* wanted \[0, 1\]"):
        prm_ce_loss(golden.prm, golden.ref, golden.mask, outcomes, golden.beta)


def test_one_outcome_per_response_is_wanted(golden):
    with pytest.raises(ValueError, match=r"outcome_rewards: found shape \[4\], wanted \[8\]"):
        prm_ce_loss(golden.prm, golden.ref, golden.mask, golden.outcomes[:4], golden.beta)


def test_an_empty_response_is_refused(golden):
    mask = golden.mask.clone()
    mask[6] = False
    with pytest.raises(ValueError, match=r"1 rows without a token \(first: \[6\]\)"):
        prm_ce_loss(golden.prm, golden.ref, mask, golden.outcomes, golden.beta)


LOSSES = ["ce", "ce_hard", "dpo", "nca", "kto"]


def rewards_of(vectors, factor=1):
    return factor * implicit_rewards(vectors.prm, vectors.ref, vectors.mask, vectors.beta).sum(1)


@pytest.mark.parametrize("factor", [1, -20])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_sequence_rewards_by_value_and_slope(golden, loss, factor):
    """At -20 the right responses' mean reward is above 0, so KTO's z takes part."""
    wanted = golden.raw(f"prm_loss.{loss}.at_{factor}")
    rewards = rewards_of(golden, factor).requires_grad_()
    value = sequence_loss(rewards, golden.outcomes, 4, loss)
    value.backward()
    assert value.item() == pytest.approx(wanted["loss"], rel=0, abs=1e-10)
    assert rewards.grad.tolist() == pytest.approx(wanted["slopes"], rel=0, abs=1e-10)


def test_ktos_mean_rewards_have_taken_part(golden):
    rewards, right = rewards_of(golden, -20), golden.outcomes == 1
    assert min(rewards[right].mean(), rewards[~right].mean()) > 0.5


def test_losses_of_pairs_are_other_peoples(shared):
    """Of binary outcomes. Their KTO has each response once for each of its pairs."""
    wanted, rewards = shared.raw("offline_losses"), rewards_of(shared)
    binary = (shared.outcomes == 1).double()
    for loss in ("dpo", "nca"):
        found = sequence_loss(rewards, binary, 4, loss).item()
        assert found == pytest.approx(wanted[loss], abs=1e-10)
    rows = torch.tensor(wanted["pairs"]).flatten()
    kto = sequence_loss(rewards[rows], binary[rows], 1, "kto").item()
    assert kto == pytest.approx(wanted["kto"], abs=1e-10)


@pytest.mark.parametrize("sizes", [[8], [1, 7], [3, 3, 2], [1] * 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_tangent_have_the_whole_losss_value_and_gradient(golden, loss, sizes):
    """Its parts are shuffled, as ranks and micro-batches may share a mini-batch."""
    wanted = golden.raw(f"prm_loss.{loss}.at_1")
    prm = golden.prm.clone().requires_grad_()
    tangent = Tangent.of(rewards_of(golden), golden.outcomes, 4, loss)
    total = 0.0
    for rows in torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]).split(sizes):
        rewards = implicit_rewards(prm[rows], golden.ref[rows], golden.mask[rows], golden.beta)
        part = tangent.part(rewards.sum(dim=1), rows)
        part.backward()
        total += part.item()
    assert total == pytest.approx(wanted["loss"], abs=1e-10)
    slopes = torch.tensor(wanted["slopes"], dtype=torch.float64)
    gradient = golden.beta * slopes[:, None] * golden.mask
    torch.testing.assert_close(prm.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "nca"])
def test_groups_without_a_difference_teach_nothing(loss):
    """Two groups of two; only the second has a pair, and alone it has the same loss."""
    rewards, outcomes = torch.tensor([3.0, -1.0, 0.5, 0.2]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    alone = sequence_loss(rewards[2:], outcomes[2:], 2, loss)
    assert torch.equal(sequence_loss(rewards, outcomes, 2, loss), alone)
    tangent = Tangent.of(rewards[:2], outcomes[:2], 2, loss)
    assert tangent.loss == 0
    assert tangent.slopes.tolist() == [0, 0]


def test_kto_of_one_side_alone_has_no_mean_of_the_other():
    found = sequence_loss(torch.tensor([0.0, 2.0]), torch.ones(2), 2, "kto")
    assert found.item() == pytest.approx((0.5 + 1 - 1 / (1 + math.exp(-2))) / 2)


@pytest.mark.parametrize("loss", ["ce", "dpo", "nca"])
def test_a_wrong_and_confident_prm_keeps_its_slope(loss):
    tangent = Tangent.of(torch.tensor([-90.0, 90.0]), torch.tensor([1.0, 0.0]), 2, loss)
    assert tangent.loss > 40
    assert tangent.slopes[0] < -0.4
    assert tangent.slopes[1] > 0.4


def test_partial_groups_are_refused(golden):
    with pytest.raises(ValueError, match=r"values of shape \[7\] and group_size 4"):
        sequence_loss(rewards_of(golden)[:7], golden.outcomes[:7], 4, "dpo")
    with pytest.raises(ValueError, match=r"sequence_rewards: found shape \[7\], wanted \[8\]"):
        sequence_loss(rewards_of(golden)[:7], golden.outcomes, 4, "dpo")
