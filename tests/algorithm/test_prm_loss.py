from __future__ import annotations

import pytest
import torch

from megatron_prime.algorithm.prm_loss import prm_ce_loss


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
