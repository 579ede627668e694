from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.algorithm.advantage import batch_norm
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.metrics import (
    mismatch_kl,
    pair_accuracy,
    policy_metrics,
    ref_kl,
    return_metrics,
)
from megatron_prime.config import PolicyLossOptions

OPTIONS = PolicyLossOptions()


def test_pair_accuracy(vectors):
    sums = vectors["implicit.sequence_reward"]
    wanted = vectors.raw("metric.pair_accuracy")
    found = pair_accuracy(sums, vectors.outcomes, vectors.group_size)
    assert found.item() == pytest.approx(wanted["mean"], abs=1e-10)
    for group, accuracy in enumerate(wanted["per_prompt"]):
        rows = slice(4 * group, 4 * group + 4)
        found = pair_accuracy(sums[rows], vectors.outcomes[rows], 4)
        assert found.item() == pytest.approx(accuracy, abs=1e-10)


def test_pair_accuracy_of_a_prm_that_still_equals_the_reference(vectors):
    found = pair_accuracy(torch.zeros(8), vectors.outcomes, vectors.group_size)
    assert found.item() == pytest.approx(vectors.raw("metric.pair_accuracy_at_init"), abs=1e-7)


@pytest.mark.parametrize(
    ("sums", "outcomes", "accuracy"),
    [
        ([3.0, 1.0, 2.0], [1.0, 0.0, 0.5], 1.0),
        ([1.0, 3.0, 2.0], [1.0, 0.0, 0.5], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 0.0, 0.5], 0.75),  # of weights 1, 1/2, 1/2 the last is wrong
        ([3.0, 2.0, 1.0], [0.5, 0.5, 0.5], 0.5),
    ],
)
def test_pairs_weigh_as_much_as_their_outcomes_differ(sums, outcomes, accuracy):
    assert pair_accuracy(torch.tensor(sums), torch.tensor(outcomes), 3).item() == accuracy


def test_pair_accuracy_is_the_mean_over_groups_whatever_their_weights():
    sums = torch.tensor([2.0, 1.0, 1.0, 2.0, 5.0, 5.0])
    outcomes = torch.tensor([1.0, 0.0, 0.1, 0.0, 0.3, 0.3])
    assert pair_accuracy(sums, outcomes, 2).item() == pytest.approx((1 + 0 + 0.5) / 3)


def test_pair_accuracy_refuses_rewards_of_another_batch():
    with pytest.raises(ValueError, match=r"sequence_rewards: found shape \[4\], wanted \[8\]"):
        pair_accuracy(torch.zeros(4), torch.zeros(8), 4)


def test_policy_metrics(golden):
    weights = golden["rloo.released.advantage"]
    found = policy_metrics(golden.new, golden.old, weights, golden.mask, OPTIONS)
    assert found == pytest.approx(
        {
            "clip_fraction": golden.raw("ppo.clipfrac"),
            "approx_kl": golden.raw("ppo.approx_kl"),
            "ratio_max": golden.raw("ppo.ratio_max"),
        },
        abs=1e-10,
    )


def test_clip_fraction_and_approx_kl_of_the_shared_vectors(shared):
    weights = shared["rloo.released.advantage"]
    found = policy_metrics(shared.new, shared.old, weights, shared.mask, OPTIONS)
    assert found["clip_fraction"] == pytest.approx(shared.raw("ppo.clipfrac"), abs=1e-10)
    assert found["approx_kl"] == pytest.approx(shared.raw("ppo.approx_kl"), abs=1e-10)


def test_the_largest_ratio_may_lie_below_1():
    mask = torch.tensor([[True, True, False]])
    new = torch.tensor([[math.log(0.5), math.log(0.25), 0.0]], requires_grad=True)
    found = policy_metrics(new, torch.zeros(1, 3), torch.ones(1, 3), mask, OPTIONS)
    assert found["ratio_max"] == pytest.approx(0.5)
    assert found["approx_kl"] == pytest.approx(1.5 * math.log(2))  # the old policy liked them more


def test_mismatch(golden):
    found = mismatch_kl(golden.old, golden.new, golden.mask)
    wanted = {
        "mismatch_kl": golden.raw("mismatch.kl_k3"),
        "mismatch_max": golden.raw("mismatch.max"),
    }
    assert found == pytest.approx(wanted, abs=1e-10)


def test_mismatch_estimates_the_divergence_of_the_trainer_from_the_engine():
    """All outcomes of a three-sided die, in the frequencies in which the engine throws them."""
    engine, trainer = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)
    throws = [0, 0, 1, 2]
    rollout = torch.tensor([[math.log(engine[side]) for side in throws]], dtype=torch.float64)
    old = torch.tensor([[math.log(trainer[side]) for side in throws]], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(engine, trainer, strict=True))
    found = mismatch_kl(old, rollout, torch.ones(1, 4).bool())
    assert found["mismatch_kl"] == pytest.approx(exact)
    assert found["mismatch_max"] == pytest.approx(math.log(2))


def test_the_largest_mismatch_may_be_of_either_sign():
    old, rollout = torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, -1.5]])
    mask = torch.ones(1, 2).bool()
    assert mismatch_kl(old, rollout, mask)["mismatch_max"] == 2
    assert mismatch_kl(rollout, old, mask)["mismatch_max"] == 2


def test_no_mismatch_is_exactly_0(golden):
    found = mismatch_kl(golden.old.float(), golden.old.float(), golden.mask)
    assert found == {"mismatch_kl": 0.0, "mismatch_max": 0.0}


def test_returns(golden):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    found = return_metrics(rewards, golden.outcomes, golden.mask, gamma=0.9)
    assert found == pytest.approx(golden.raw("returns.g0.9"), abs=1e-10)


def test_returns_of_outcomes_alone(golden):
    found = return_metrics(None, golden.outcomes, golden.mask, gamma=1.0)
    wanted = golden.raw("returns.g0.9")
    assert found == pytest.approx({key: wanted[key] for key in wanted if "outcome" in key})


def test_the_largest_undiscounted_process_return_is_what_batch_norm_divides_by(golden):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    largest = return_metrics(rewards, golden.outcomes, golden.mask, gamma=1.0)
    scale = largest["process_return_abs_max"] + 1e-6
    torch.testing.assert_close(batch_norm(rewards) * scale, rewards, rtol=0, atol=1e-14)


def test_garbage_on_padding_changes_no_metric(golden, spoil):
    mask, weights = golden.mask, golden["rloo.released.advantage"]
    new, old, advantages = (spoil(x, mask) for x in (golden.new, golden.old, weights))
    clean = policy_metrics(golden.new, golden.old, weights, mask, OPTIONS)
    assert policy_metrics(new, old, advantages, mask, OPTIONS) == clean
    assert mismatch_kl(old, new, mask) == mismatch_kl(golden.old, golden.new, mask)
    rewards = torch.where(mask, golden.prm, 0.0)
    clean = return_metrics(rewards, golden.outcomes, mask, gamma=0.9)
    assert return_metrics(spoil(rewards, mask), golden.outcomes, mask, gamma=0.9) == clean


def test_metrics_refuse_shapes_that_differ(golden):
    short = golden.old[:, :5]
    with pytest.raises(ValueError, match="old_logprobs: found shape"):
        policy_metrics(golden.new, short, golden.new, golden.mask, OPTIONS)
    with pytest.raises(ValueError, match="rollout_logprobs: found shape"):
        mismatch_kl(golden.old, short, golden.mask)
    with pytest.raises(ValueError, match="process_rewards: found shape"):
        return_metrics(short, golden.outcomes, golden.mask, gamma=1.0)
    with pytest.raises(ValueError, match="outcome_rewards: found shape"):
        return_metrics(None, golden.outcomes[:4], golden.mask, gamma=1.0)


def test_kl_from_the_reference(golden):
    found = ref_kl(golden.new, golden.ref, golden.mask)
    assert found == {"ref_kl": pytest.approx(float(golden["kl.k3"].sum() / golden.mask.sum()))}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("asymmetric", PolicyLossOptions(clip_high=0.05)),
        ("dual", PolicyLossOptions(dual_clip=1.1)),
        ("asymmetric_dual", PolicyLossOptions(clip=0.3, clip_high=0.1, dual_clip=1.15)),
    ],
)
def test_every_clipped_token_counts(golden, name, options):
    weights = golden["rloo.released.advantage"]
    found = policy_metrics(golden.new, golden.old, weights, golden.mask, options)
    assert found["clip_fraction"] == pytest.approx(golden.raw(f"ppo.{name}.clipfrac"))
