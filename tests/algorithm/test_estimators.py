"""The estimators beside RLOO, and rewards of steps and whole responses."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_prime.algorithm.advantage import AdvantageOptions, prime_advantages
from megatron_prime.algorithm.implicit_reward import implicit_rewards

PLAIN = {"process_norm": "none", "whiten": False}
GRPO = AdvantageOptions(estimator="grpo", **PLAIN)
REINFORCE = AdvantageOptions(estimator="reinforce", **PLAIN)
PRIME_VALUE = AdvantageOptions(estimator="prime_value", **PLAIN)
RLOO = AdvantageOptions(process_baseline="paper", **PLAIN)
ALL = [
    RLOO,
    *(AdvantageOptions(estimator=name) for name in ("grpo", "reinforce", "prime_value")),
    *(
        AdvantageOptions(estimator=name, granularity=granularity, process_baseline=baseline)
        for name, granularity, baseline in itertools.product(
            ("rloo", "grpo"), ("step", "response"), ("released", "paper")
        )
    ),
    AdvantageOptions(estimator="prime_value", granularity="step"),
]
FINE = dict(rtol=0, atol=1e-14)


def change(options, **changes):
    return options.model_copy(update=changes)


def found(vectors, options, step_ends=None):
    rewards = implicit_rewards(vectors.prm, vectors.ref, vectors.mask, vectors.beta)
    given = (rewards, vectors.outcomes, vectors.mask, vectors.group_size)
    return prime_advantages(*given, options, step_ends)


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.fixture
def ends(golden):
    return golden["steps.ends"].bool()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_grpo_is_equation_7(vectors, gamma):
    options = change(GRPO, gamma=gamma)
    close(found(vectors, options), vectors[f"grpo.advantage.ddof1.g{gamma}"])
    process_alone = change(options, outcome_weight=0.0)
    close(found(vectors, process_alone), vectors[f"grpo.process.ddof1.g{gamma}"])


def test_grpo_of_the_outcome_alone(vectors):
    wanted = vectors["grpo.outcome.ddof1"][:, None] * vectors.mask
    options = change(GRPO, process_weight=0.0)
    close(prime_advantages(None, vectors.outcomes, vectors.mask, 4, options), wanted)


def test_grpo_without_the_deviation_is_the_reward_less_the_mean(golden):
    options = change(GRPO, process_weight=0.0, group_std=False)
    centred = prime_advantages(None, golden.outcomes, golden.mask, 4, options)
    close(centred, golden["grpo.outcome.centred"][:, None] * golden.mask)
    # The own response is a quarter of the mean: 3/4 of what leave-one-out gives.
    close(centred, 0.75 * golden["rloo.outcome"][:, None] * golden.mask)


def test_grpo_takes_the_scale_out_of_process_rewards(golden):
    mask, outcomes = golden.mask, golden.outcomes
    rewards = implicit_rewards(golden.prm, golden.ref, mask, 1.0)
    a, b = (prime_advantages(c * rewards, outcomes, mask, 4, GRPO) for c in (1.0, 7.0))
    close(a, b, atol=1e-4)  # but for the 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outcome", [0.0, 0.1, 0.7, 1.0])
def test_equal_outcomes_have_no_advantage_in_grpo_not_even_by_rounding(dtype, outcome):
    outcomes = torch.full((6,), outcome, dtype=dtype)
    options = change(GRPO, process_weight=0.0)
    found = prime_advantages(None, outcomes, torch.ones(6, 2).bool(), 3, options)
    assert found.abs().max() < 1e-9


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_is_equation_8(vectors, gamma):
    options = change(REINFORCE, gamma=gamma)
    close(found(vectors, options), vectors[f"reinforce.advantage.g{gamma}"])


def test_reinforce_of_the_outcome_alone(vectors):
    options = change(REINFORCE, process_weight=0.0)
    wanted = vectors["reinforce.outcome_only"]
    close(prime_advantages(None, vectors.outcomes, vectors.mask, 4, options), wanted)


def test_prime_as_value_model(vectors):
    close(found(vectors, PRIME_VALUE), vectors["prime_as_value.advantage"])


def test_value_and_return_of_prime_differ_by_the_rewards_of_the_whole_response(golden):
    """r_o + sum_{s>=t} r_s = (r_o - v(y_<t)) + R."""
    whole = golden["implicit.sequence_reward"][:, None] * golden.mask
    close(found(golden, REINFORCE), found(golden, PRIME_VALUE) + whole)


@pytest.mark.parametrize("options", [REINFORCE, PRIME_VALUE])
def test_without_a_group_a_single_response_will_do(golden, options):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    given = (rewards, golden.outcomes, golden.mask)
    assert torch.equal(prime_advantages(*given, 1, options), found(golden, options))


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_a_single_response_is_refused_where_others_are_needed(golden, estimator):
    options = AdvantageOptions(estimator=estimator)
    with pytest.raises(ValueError, match=rf'group_size 1, .*"{estimator}".*rollout\.group_size'):
        prime_advantages(golden.prm, golden.outcomes, golden.mask, 1, options)


@pytest.mark.parametrize(
    ("granularity", "name"), [("step", "step"), ("response", "whole")], ids=str
)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (RLOO, "rloo.{}.paper.g0.9"),
        (change(RLOO, process_baseline="released"), "rloo.{}.released.g0.9"),
        (GRPO, "grpo.{}.g0.9"),
        (REINFORCE, "reinforce.{}.g0.9"),
    ],
    ids=["rloo-paper", "rloo-released", "grpo", "reinforce"],
)
def test_rewards_of_steps_and_responses(golden, ends, options, expected, granularity, name):
    options = change(options, granularity=granularity, gamma=0.9)
    close(found(golden, options, ends), golden[expected.format(name)])


def test_a_value_that_grows_by_steps(golden, ends):
    close(
        found(golden, change(PRIME_VALUE, granularity="step"), ends), golden["prime_as_value.step"]
    )


def test_the_reward_of_a_response_compares_whole_responses(golden):
    """By hand: every token gets R_i less the mean of the others' R."""
    options = change(RLOO, granularity="response", outcome_weight=0.0)
    sums = golden["implicit.sequence_reward"].reshape(2, 4)
    wanted = sums - (sums.sum(dim=1, keepdim=True) - sums) / 3
    close(found(golden, options), wanted.reshape(8, 1) * golden.mask)


def test_steps_of_one_token_are_tokens(golden):
    every = torch.ones_like(golden.mask)
    for options in (RLOO, GRPO, REINFORCE, PRIME_VALUE):
        close(found(golden, change(options, granularity="step"), every), found(golden, options))


def test_a_response_of_one_step_is_a_response(golden):
    none = torch.zeros_like(golden.mask)
    for options in (RLOO, GRPO, REINFORCE):
        steps = found(golden, change(options, granularity="step"), none)
        close(steps, found(golden, change(options, granularity="response")))


def test_missing_step_ends_are_refused(golden):
    with pytest.raises(ValueError, match=r"no step ends .*advantage\.granularity = \"token\""):
        found(golden, AdvantageOptions(granularity="step"))


@pytest.mark.parametrize("options", ALL, ids=str)
def test_the_order_of_groups_and_of_their_responses_does_not_matter(golden, ends, options):
    rows = torch.tensor([6, 4, 5, 7, 2, 0, 3, 1])
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)[rows]
    given = (rewards, golden.outcomes[rows], golden.mask[rows], 4, options, ends[rows])
    torch.testing.assert_close(
        prime_advantages(*given), found(golden, options, ends)[rows], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("options", ALL, ids=str)
def test_padding_and_its_garbage_change_nothing(golden, ends, spoil, widen, options):
    mask = widen(golden.mask)
    rewards = widen(implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta))
    there = ~mask | widen(ends)  # steps end on all padding
    given = (spoil(rewards, mask), golden.outcomes, mask, 4, options, there)
    advantages = prime_advantages(*given)
    torch.testing.assert_close(advantages[:, :7], found(golden, options, ends), rtol=0, atol=1e-12)
    assert advantages[~mask].abs().max() == 0


@pytest.mark.parametrize("options", ALL, ids=str)
def test_float32_is_near_float64(golden, ends, options):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    given = (rewards.float(), golden.outcomes.float(), golden.mask, 4, options, ends)
    advantages = prime_advantages(*given)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(
        advantages.double(), found(golden, options, ends), rtol=1e-4, atol=1e-4
    )
