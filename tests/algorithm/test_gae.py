"""PPO's advantages and the critic's loss: values, gradients, invariances, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prime.algorithm.advantage import prime_advantages
from megatron_prime.algorithm.gae import gae_advantages
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.value_loss import (
    clipped_value_loss,
    explained_variance,
    value_metrics,
)
from megatron_prime.config import AdvantageOptions

PLAIN = {"process_norm": "none", "whiten": False}
GAE = AdvantageOptions(estimator="gae", **PLAIN)
OUTCOME = AdvantageOptions(estimator="gae", process_weight=0.0, **PLAIN)
REINFORCE = AdvantageOptions(estimator="reinforce", **PLAIN)


def change(options, **changes):
    return options.model_copy(update=changes)


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def given(vectors):
    rewards = implicit_rewards(vectors.prm, vectors.ref, vectors.mask, vectors.beta)
    return rewards, vectors.outcomes, vectors.mask


@pytest.mark.parametrize(("gamma", "mix"), [(1.0, 1.0), (0.99, 0.95)])
@pytest.mark.parametrize(("name", "options"), [("prime", GAE), ("outcome", OUTCOME)])
def test_golden_values(vectors, name, options, gamma, mix):
    options = change(options, gamma=gamma, gae_lambda=mix)
    advantages, returns, _ = gae_advantages(*given(vectors), vectors.values, options)
    close(advantages, vectors[f"gae.{name}.g{gamma}.l{mix}.advantage"])
    close(returns, vectors[f"gae.{name}.g{gamma}.l{mix}.returns"])


@pytest.mark.parametrize(("name", "options"), [("prime", GAE), ("outcome", OUTCOME)])
def test_without_lambda_only_the_next_value_counts(golden, name, options):
    options = change(options, gamma=0.9, gae_lambda=0.0)
    advantages, _, _ = gae_advantages(*given(golden), golden.values, options)
    close(advantages, golden[f"gae.{name}.g0.9.l0.0.advantage"])


@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_any_length_against_loops(length):
    """Backwards in numpy, one response at a time."""
    rng = np.random.default_rng(length)
    lengths = rng.integers(1, length + 1, 5)
    lengths[0] = length
    rewards, values = rng.normal(size=(2, 5, length))
    outcomes = rng.random(5)
    gamma, mix = 0.97, 0.8
    wanted, mask = np.zeros((5, length)), np.arange(length) < lengths[:, None]
    for i, last in enumerate(lengths):
        later = following = 0.0
        for t in reversed(range(last)):
            reward = 0.5 * rewards[i, t] + 2 * outcomes[i] * (t == last - 1)
            later = reward + gamma * following - values[i, t] + gamma * mix * later
            wanted[i, t], following = later, values[i, t]
    options = change(GAE, gamma=gamma, gae_lambda=mix, process_weight=0.5, outcome_weight=2.0)
    tensors = (torch.from_numpy(x) for x in (rewards, outcomes, mask, values))
    advantages, returns, _ = gae_advantages(*tensors, options)
    close(advantages, torch.from_numpy(wanted))
    close(returns, torch.from_numpy(wanted + values * mask))


@pytest.mark.parametrize("process_weight", [0.0, 1.0, 3.0])
def test_a_critic_of_zeros_is_reinforce(golden, process_weight):
    nothing = torch.zeros_like(golden.values)
    weights = {"process_weight": process_weight}
    advantages, returns, _ = gae_advantages(*given(golden), nothing, change(GAE, **weights))
    close(advantages, prime_advantages(*given(golden), 1, change(REINFORCE, **weights)))
    assert torch.equal(advantages, returns)


def test_at_lambda_1_returns_know_nothing_of_the_values(golden):
    _, a, _ = gae_advantages(*given(golden), golden.values, GAE)
    _, b, _ = gae_advantages(*given(golden), -3 * golden.values + 1, GAE)
    close(a, b)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_rewards_to_come_are_the_returns_at_lambda_1(golden, gamma):
    options = change(GAE, gamma=gamma, gae_lambda=0.3)
    _, returns, to_come = gae_advantages(*given(golden), golden.values, options)
    _, wanted, same = gae_advantages(*given(golden), golden.values, change(GAE, gamma=gamma))
    close(to_come, wanted)
    close(same, wanted)
    assert (returns - wanted).abs().max() > 1e-3, "at lambda 0.3 they have values in them"


def test_whitened_by_the_rows_that_learn(golden):
    learns = torch.tensor([True, False, True, True, False, True, True, True])
    options = change(GAE, whiten=True)
    found = gae_advantages(*given(golden), golden.values, options, learns=learns)
    raw, *rest = gae_advantages(*given(golden), golden.values, GAE)
    inside = raw[golden.mask & learns[:, None]]
    close(found[0], torch.where(golden.mask, (raw - inside.mean()) / inside.std(), 0.0), 1e-6)
    for a, b in zip(found[1:], rest, strict=True):
        assert torch.equal(a, b), "of all rows"


def test_a_critic_that_is_right_leaves_nothing(golden):
    _, returns, _ = gae_advantages(*given(golden), golden.values, GAE)
    for mix in (0.0, 0.6, 1.0):
        left, same, _ = gae_advantages(*given(golden), returns, change(GAE, gae_lambda=mix))
        close(left, torch.zeros_like(left))
        close(same, returns)


def test_whitening_and_norming(golden):
    options = change(GAE, whiten=True, process_norm="batch_norm", gae_lambda=0.9)
    advantages, returns, _ = gae_advantages(*given(golden), golden.values, options)
    inside = advantages[golden.mask]
    assert inside.mean().abs() < 1e-12
    assert inside.var() == pytest.approx(1.0, abs=1e-6)
    rewards, *rest = given(golden)
    largest = max(
        float(abs(row[t:].sum()))
        for row, mask in zip(rewards, golden.mask, strict=True)
        for t in range(int(mask.sum()))
    )
    plain = change(options, whiten=False, process_norm="none")
    raw, wanted, _ = gae_advantages(rewards / (largest + 1e-6), *rest, golden.values, plain)
    close(returns, wanted)
    close(inside, ((raw[golden.mask] - raw[golden.mask].mean()) / raw[golden.mask].std()), 1e-6)


@pytest.mark.parametrize("granularity", ["step", "response"])
def test_rewards_of_steps_and_responses(golden, granularity):
    rewards, outcomes, mask = given(golden)
    options = change(GAE, granularity=granularity, gamma=0.9, gae_lambda=0.7)
    ends = golden["steps.ends"].bool()
    found = gae_advantages(rewards, outcomes, mask, golden.values, options, ends)
    name = {"step": "implicit.step_granularity", "response": "implicit.whole_granularity"}
    there = golden[name[granularity]]
    at_tokens = change(options, granularity="token")
    for a, b in zip(
        found, gae_advantages(there, outcomes, mask, golden.values, at_tokens), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("options", [GAE, OUTCOME, AdvantageOptions(estimator="gae")])
def test_padding_never_matters(golden, spoil, widen, options):
    rewards, outcomes, mask = given(golden)
    clean = gae_advantages(rewards, outcomes, mask, golden.values, options)
    spoilt = gae_advantages(
        spoil(rewards, mask), outcomes, mask, spoil(golden.values, mask), options
    )
    wide = gae_advantages(widen(rewards), outcomes, widen(mask), widen(golden.values), options)
    for a, b, c in zip(clean, spoilt, wide, strict=True):
        assert torch.equal(a, b)
        close(a, c[:, : a.shape[1]], 1e-12)
        assert not c[:, a.shape[1] :].any()


def test_no_gradient_and_no_rounding_of_float64(golden):
    rewards, outcomes, mask = given(golden)
    values = golden.values.clone().requires_grad_()
    for found in gae_advantages(rewards.requires_grad_(), outcomes, mask, values, GAE):
        assert not found.requires_grad
        assert found.dtype == torch.float64
    halves = (x.to(torch.bfloat16) for x in (rewards, outcomes))
    for found in gae_advantages(*halves, mask, values.bfloat16(), GAE):
        assert found.dtype == torch.float32


def test_refusals(golden):
    rewards, outcomes, mask = given(golden)
    with pytest.raises(ValueError, match="values: found shape"):
        gae_advantages(rewards, outcomes, mask, golden.values[:, :-1], GAE)
    with pytest.raises(ValueError, match="found no process rewards at process_weight 1"):
        gae_advantages(None, outcomes, mask, golden.values, GAE)
    with pytest.raises(ValueError, match="call gae_advantages"):
        prime_advantages(rewards, outcomes, mask, 4, GAE)
    gae_advantages(None, outcomes, mask, golden.values, OUTCOME)  # fine: they have no weight


def moved(vectors):
    """The inputs of the golden loss; the shared vectors say in words what `value.moved` is."""
    step = torch.tensor([[0.7 if (i + t) % 2 else -0.1 for t in range(7)] for i in range(8)])
    return vectors.values + step.double(), vectors.values, vectors["gae.prime.g1.0.l1.0.returns"]


def test_the_loss(vectors):
    wanted = vectors.raw("value.loss")
    loss = clipped_value_loss(*moved(vectors), vectors.mask, 0.5)
    close(loss, torch.tensor(wanted["loss"], dtype=torch.float64), 1e-7)  # 0.7 in float32
    found = value_metrics(*moved(vectors), vectors.mask, 0.5)
    assert found["clip_fraction"] == pytest.approx(wanted["clipfrac"])


def test_the_loss_and_its_gradient(golden):
    values = golden["value.moved"].requires_grad_()
    rest = (golden.values, golden["gae.prime.g1.0.l1.0.returns"], golden.mask)
    clipped_value_loss(values, *rest, 0.5).backward()
    close(values.grad, golden["value.grad"])
    unclipped = clipped_value_loss(values, *rest, None)
    close(unclipped.detach(), golden["value.loss.unclipped"])
    assert value_metrics(values, *rest, None) == {"clip_fraction": 0.0}


def test_a_loss_of_parts_weighs_their_tokens(golden):
    values, old, returns = moved(golden)
    whole = clipped_value_loss(values, old, returns, golden.mask, 0.5)
    parts = sum(
        clipped_value_loss(values[r], old[r], returns[r], golden.mask[r], 0.5)
        * golden.mask[r].sum()
        for r in (slice(0, 3), slice(3, 8))
    )
    close(whole, parts / golden.mask.sum())


def test_the_loss_ignores_padding(golden, spoil):
    values, *rest = moved(golden)
    spoilt = [spoil(x, golden.mask) for x in rest]
    a, b = values.clone().requires_grad_(), spoil(values, golden.mask).requires_grad_()
    clean = clipped_value_loss(a, *rest, golden.mask, 0.5)
    dirty = clipped_value_loss(b, *spoilt, golden.mask, 0.5)
    assert torch.equal(clean, dirty)
    clean.backward()
    dirty.backward()
    assert torch.equal(a.grad, b.grad)


def test_explained_variance(golden, spoil):
    values, _, returns = moved(golden)
    wanted = float(golden["value.explained_variance"])
    assert explained_variance(values, returns, golden.mask) == pytest.approx(wanted, abs=1e-6)
    spoilt = spoil(values, golden.mask)
    assert explained_variance(spoilt, returns, golden.mask) == pytest.approx(wanted, abs=1e-6)
    assert explained_variance(returns, returns, golden.mask) == 1.0
    assert explained_variance(torch.ones_like(values), returns, golden.mask) == pytest.approx(0)
    assert explained_variance(values, torch.ones_like(returns), golden.mask) == 0.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_equal_returns_explain_nothing(scale):
    """Their sums differ by rounding alone: what they vary by is no variance to explain."""
    rng = torch.Generator().manual_seed(3)
    values = torch.randn(64, 300, generator=rng)
    mask = torch.arange(300) < torch.randint(200, 301, (64, 1), generator=rng)
    for mix in (0.9, 0.95, 1.0):
        options = change(OUTCOME, gae_lambda=mix, outcome_weight=scale)
        _, returns, to_come = gae_advantages(None, torch.ones(64), mask, values, options)
        assert explained_variance(values, to_come, mask) == 0.0
    assert mix == 1.0
    assert (returns - scale)[mask].abs().max() > 0, "equal but for rounding"
    assert explained_variance(values, returns, mask) == 0.0


def test_small_returns_that_do_vary_are_explained():
    mask = torch.ones(4, 5, dtype=torch.bool)
    returns = 1e-3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert explained_variance(0.5 * returns, returns, mask) == pytest.approx(0.75, abs=1e-6)
