from __future__ import annotations

import pytest
import torch

from megatron_prime.algorithm.policy_loss import (
    PolicyLossOptions,
    aggregate,
    clipped_policy_loss,
    kl_penalties,
    surrogate_losses,
)

PER_RESPONSE = PolicyLossOptions()
PER_TOKEN = PolicyLossOptions(aggregation="token_mean")
ENDS = {
    "asymmetric": PolicyLossOptions(aggregation="token_mean", clip=0.2, clip_high=0.05),
    "dual": PolicyLossOptions(aggregation="token_mean", clip=0.2, dual_clip=1.1),
    "asymmetric_dual": PolicyLossOptions(
        aggregation="token_mean", clip=0.3, clip_high=0.1, dual_clip=1.15
    ),
}
KL = ["k1", "k2", "k3"]


def kl_of(vectors, estimator):
    return kl_penalties(vectors.new, vectors.ref, vectors.old, vectors.mask, estimator)


def loss_and_gradient(new, old, advantages, mask, options):
    new = new.clone().requires_grad_()
    loss = clipped_policy_loss(new, old, advantages, mask, options)
    loss.backward()
    return loss.detach(), new.grad


def arguments(vectors):
    return vectors.new, vectors.old, vectors["rloo.released.advantage"], vectors.mask


def test_the_released_run_clips_at_0_2_and_averages_per_response():
    assert (PER_RESPONSE.clip, PER_RESPONSE.aggregation) == (0.2, "seq_mean_token_mean")


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        (PER_RESPONSE, "ppo.loss.seq_mean_token_mean", "ppo.grad_new_logp.seq_mean"),
        (PER_TOKEN, "ppo.loss.token_mean", "ppo.grad_new_logp.token_mean"),
    ],
)
def test_value_and_gradient(vectors, options, value, gradient):
    found = loss_and_gradient(*arguments(vectors), options)
    torch.testing.assert_close(found[0], vectors[value], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1], vectors[gradient], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ENDS)
def test_other_ends_of_the_ratio(golden, name):
    loss, gradient = loss_and_gradient(*arguments(golden), ENDS[name])
    torch.testing.assert_close(loss, golden[f"ppo.{name}.loss.token_mean"], rtol=0, atol=1e-10)
    wanted = golden[f"ppo.{name}.grad_new_logp.token_mean"]
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)
    assert abs(loss - golden["ppo.loss.token_mean"]) > 1e-3, "these ends are felt"


def test_equal_ends_and_a_bound_out_of_reach_are_the_plain_clip(golden):
    far = PolicyLossOptions(clip_high=0.2, dual_clip=1e6)
    for a, b in zip(
        loss_and_gradient(*arguments(golden), far),
        loss_and_gradient(*arguments(golden), PER_RESPONSE),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [PER_RESPONSE, PER_TOKEN, *ENDS.values()], ids=str)
def test_gradient_agrees_with_finite_differences(golden, options):
    new = golden.new.clone().requires_grad_()
    rest = arguments(golden)[1:]
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, *rest, options), new)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # gained enough
        (0.5, 2.0, -1.0, -1.0),  # lost: led back
        (1.5, -2.0, 3.0, 3.0),  # gained although bad: led back
        (0.5, -2.0, 1.6, 0.0),  # lost enough
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, slope):
    value, gradient = loss_and_gradient(
        torch.tensor([[ratio]], dtype=torch.float64).log(), torch.zeros(1, 1),
        torch.tensor([[advantage]]), torch.ones(1, 1).bool(), PER_RESPONSE,
    )  # fmt: skip
    assert value.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)


def test_the_first_update_follows_the_advantage_even_if_old_is_the_same_tensor(golden):
    new = golden.new.clone().requires_grad_()
    advantages = golden["rloo.released.advantage"].requires_grad_()
    clipped_policy_loss(new, new, advantages, golden.mask, PER_TOKEN).backward()
    torch.testing.assert_close(new.grad, -advantages.detach() / golden.mask.sum())
    assert advantages.grad is None


def test_a_long_response_weighs_as_much_as_a_short_one_or_as_its_tokens():
    values = torch.tensor([[1.0, float("nan"), float("nan")], [2.0, 4.0, 6.0]])
    mask = ~values.isnan()
    assert aggregate(values, mask, "seq_mean_token_mean").item() == (1 + 4) / 2
    assert aggregate(values, mask, "token_mean").item() == 13 / 4


def test_surrogate_losses_are_0_on_padding(golden, spoil):
    new, old, weights, mask = arguments(golden)
    for losses in surrogate_losses(
        spoil(new, mask), spoil(old, mask), spoil(weights, mask), mask, PER_RESPONSE
    ):
        assert losses[~mask].abs().max() == 0


def test_the_entropy_bonus_is_the_callers(golden):
    with_entropy = PolicyLossOptions(entropy_coefficient=0.5)
    a = clipped_policy_loss(*arguments(golden), with_entropy)
    assert torch.equal(a, clipped_policy_loss(*arguments(golden), PER_RESPONSE))


@pytest.mark.parametrize("options", [PER_RESPONSE, PER_TOKEN])
def test_garbage_on_padding_changes_neither_value_nor_gradient(golden, spoil, options):
    new, old, advantages, mask = arguments(golden)
    garbled = (spoil(x, mask) for x in (new, old, advantages))
    found = loss_and_gradient(*garbled, mask, options)
    for a, b in zip(found, loss_and_gradient(*arguments(golden), options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [PER_RESPONSE, PER_TOKEN])
def test_more_padding_changes_nothing(golden, widen, options):
    loss, gradient = loss_and_gradient(*(widen(x) for x in arguments(golden)), options)
    wanted_loss, wanted_gradient = loss_and_gradient(*arguments(golden), options)
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradient[:, :7], wanted_gradient)
    assert gradient[:, 7:].abs().max() == 0


@pytest.mark.parametrize("sizes", [[1, 7], [3, 3, 2], [2] * 4, [1] * 8])
@pytest.mark.parametrize("options", [PER_RESPONSE, PER_TOKEN])
def test_weighted_micro_batches_sum_to_the_whole(golden, sizes, options):
    total, gradient = 0.0, torch.zeros_like(golden.new)
    per_token = options.aggregation == "token_mean"
    shares = golden.mask.sum(dim=1) if per_token else torch.ones(8)
    for rows in torch.arange(8).split(sizes):
        part = loss_and_gradient(*(x[rows] for x in arguments(golden)), options)
        weight = shares[rows].sum() / shares.sum()
        total += part[0] * weight
        gradient[rows] = part[1] * weight
    whole = loss_and_gradient(*arguments(golden), options)
    torch.testing.assert_close(total, whole[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient, whole[1], rtol=0, atol=1e-7)


def test_unweighted_token_means_of_micro_batches_are_another_loss(vectors):
    parts = [
        clipped_policy_loss(*(x[row : row + 2] for x in arguments(vectors)), PER_TOKEN)
        for row in range(0, 8, 2)
    ]
    wanted = vectors["ppo.loss.microbatch2"]
    torch.testing.assert_close(torch.stack(parts).mean(), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_are_computed_in_float32(golden, dtype):
    inputs = [x.to(dtype) for x in arguments(golden)[:3]]
    loss, gradient = loss_and_gradient(*inputs, golden.mask, PER_RESPONSE)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    wanted = clipped_policy_loss(*(x.double() for x in inputs), golden.mask, PER_RESPONSE)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_tensor_of_another_shape_is_named(golden, index):
    inputs = list(arguments(golden))
    inputs[index] = inputs[index][:, :5]
    name = ["logprobs", "old_logprobs", "advantages"][index]
    with pytest.raises(ValueError, match=rf"^{name}: found shape \[8, 5\], wanted \[8, 7\]"):
        clipped_policy_loss(*inputs, PER_RESPONSE)


def test_an_empty_response_is_refused(golden):
    mask = golden.mask.clone()
    mask[0] = False
    with pytest.raises(ValueError, match="1 rows without a token"):
        clipped_policy_loss(*arguments(golden)[:3], mask, PER_RESPONSE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.25, 2.0, -2.5, -2.5),  # above 1 + clip, below 1 + clip_high
        (1.5, 2.0, -2.6, 0.0),
        (2.5, -2.0, 5.0, 5.0),  # bad, and led back with all its ratio
        (3.5, -2.0, 6.0, 0.0),  # but not further than dual_clip
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_one_token_of_the_other_ends_by_hand(ratio, advantage, loss, slope):
    options = PolicyLossOptions(clip=0.2, clip_high=0.3, dual_clip=3.0)
    value, gradient = loss_and_gradient(
        torch.tensor([[ratio]], dtype=torch.float64).log(), torch.zeros(1, 1),
        torch.tensor([[advantage]]), torch.ones(1, 1).bool(), options,
    )  # fmt: skip
    assert value.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)


@pytest.mark.parametrize("estimator", KL)
def test_kl_by_value_and_gradient(golden, estimator):
    new = golden.new.clone().requires_grad_()
    found = kl_penalties(new, golden.ref, golden.old, golden.mask, estimator)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), golden[f"kl.{estimator}"], rtol=0, atol=1e-10)
    torch.testing.assert_close(new.grad, golden[f"kl.{estimator}.slope"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("estimator", KL)
@pytest.mark.parametrize("moved", [False, True], ids=["on the policy", "off it"])
def test_kl_in_expectation_over_all_tokens(estimator, moved):
    """Each token of a vocabulary of 6 once, weighed with the probability to be sampled."""
    generator = torch.Generator().manual_seed(5)
    logits, ref, old = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    old = old.log_softmax(0) if moved else logp.detach()
    column = (logp[:, None], ref[:, None], old[:, None], torch.ones(6, 1).bool())
    expected = (old.exp() * kl_penalties(*column, estimator)[:, 0]).sum()
    (found,) = torch.autograd.grad(expected, logits, retain_graph=True)
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    (of_reverse,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (of_forward,) = torch.autograd.grad(forward, logits)
    close = {
        "value": torch.allclose(expected, reverse),
        "reverse": torch.allclose(found, of_reverse),
        "forward": torch.allclose(found, of_forward),
    }
    wanted = {
        ("k1", False): {"value", "reverse"},
        ("k1", True): {"value", "reverse"},
        ("k2", False): {"reverse"},  # the value only to second order
        ("k3", False): {"value", "forward"},
    }.get((estimator, moved), set())
    assert {name for name, holds in close.items() if holds} == wanted


@pytest.mark.parametrize("estimator", KL)
def test_kl_of_garbage_on_padding_and_from_oneself(golden, spoil, estimator):
    new = spoil(golden.new, golden.mask).requires_grad_()
    rest = (spoil(golden.ref, golden.mask), spoil(golden.old, golden.mask), golden.mask)
    found = kl_penalties(new, *rest, estimator)
    found.sum().backward()
    assert torch.equal(found.detach(), kl_of(golden, estimator))
    assert new.grad[~golden.mask].abs().max() == 0
    itself = kl_penalties(golden.new, golden.new, golden.old, golden.mask, estimator)
    assert itself.abs().max() == 0


def test_kl_needs_log_probs_of_one_shape(golden):
    with pytest.raises(ValueError, match=r"^ref_logprobs: found shape \[8, 5\], wanted \[8, 7\]"):
        kl_penalties(golden.new, golden.ref[:, :5], golden.old, golden.mask, "k3")
