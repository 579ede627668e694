from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.algorithm.advantage import (
    AdvantageOptions,
    batch_norm,
    prime_advantages,
    returns_to_go,
)
from megatron_prime.algorithm.implicit_reward import implicit_rewards

RELEASED = AdvantageOptions.preset("released")
PAPER = AdvantageOptions.preset("paper")


def change(options, **changes):
    return options.model_copy(update=changes)


def advantages(vectors, options, beta=None, rewards=None, step_ends=None):
    if rewards is None:
        beta = vectors.beta if beta is None else beta
        rewards = implicit_rewards(vectors.prm, vectors.ref, vectors.mask, beta)
    given = (rewards, vectors.outcomes, vectors.mask, vectors.group_size)
    return prime_advantages(*given, options, step_ends)


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_the_presets_are_the_released_code_and_the_printed_algorithm():
    assert AdvantageOptions() == RELEASED
    assert (RELEASED.process_baseline, RELEASED.process_norm, RELEASED.whiten) == (
        "released", "batch_norm", True,
    )  # fmt: skip
    assert (PAPER.process_baseline, PAPER.process_norm, PAPER.whiten) == ("paper", "none", False)
    for options in (RELEASED, PAPER):
        assert (options.gamma, options.process_weight, options.outcome_weight) == (1, 1, 1)


def test_preset_released(vectors):
    close(advantages(vectors, RELEASED, beta=1.0), vectors["rloo.released.advantage"])


def test_preset_paper(vectors):
    close(advantages(vectors, PAPER), vectors["rloo.loo_lengthmean.advantage.g1.0"])


def test_released_before_whitening(vectors):
    options = change(RELEASED, whiten=False)
    close(advantages(vectors, options, beta=1.0), vectors["rloo.released.returns"])


def test_paper_baseline_on_normalised_and_whitened_rewards(vectors):
    options = change(RELEASED, process_baseline="paper")
    close(advantages(vectors, options, beta=1.0), vectors["rloo.paper_recommended.advantage"])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(("baseline", "name"), [("released", "code"), ("paper", "loo_lengthmean")])
def test_discount_and_baseline(vectors, baseline, name, gamma):
    options = change(PAPER, process_baseline=baseline, gamma=gamma)
    close(advantages(vectors, options), vectors[f"rloo.{name}.advantage.g{gamma}"])
    process_alone = change(options, outcome_weight=0.0)
    close(advantages(vectors, process_alone), vectors[f"rloo.{name}.process.g{gamma}"])


def test_the_weights_multiply_the_two_parts(vectors):
    options = change(RELEASED, whiten=False, process_weight=5.0, outcome_weight=5.0)
    found = advantages(vectors, options, rewards=vectors["implicit.port_token"])
    close(found, vectors["rloo.port.returns"])


def test_outcome_alone_needs_no_process_rewards(vectors):
    options = change(RELEASED, process_weight=0.0)
    found = prime_advantages(None, vectors.outcomes, vectors.mask, vectors.group_size, options)
    close(found, vectors["rloo.outcome_only.advantage"])
    assert torch.equal(advantages(vectors, options), found)  # given ones are ignored
    unwhitened = prime_advantages(
        None, vectors.outcomes, vectors.mask, 4, change(options, whiten=False)
    )
    close(unwhitened, vectors["rloo.outcome"][:, None] * vectors.mask)


def test_two_short_responses_by_hand():
    """m = 1 for both; paper: c = r - 1; released: c = 2 r - 2. Outcome parts are +1 and -1."""
    rewards = torch.tensor([[1.0, 9.0], [0.0, 2.0]])
    mask = torch.tensor([[True, False], [True, True]])
    outcomes = torch.tensor([1.0, 0.0])
    paper = prime_advantages(rewards, outcomes, mask, 2, PAPER)
    released = prime_advantages(
        rewards, outcomes, mask, 2, change(PAPER, process_baseline="released")
    )
    assert paper.tolist() == [[1, 0], [-1, 0]]
    assert released.tolist() == [[1, 0], [-1, 1]]


def test_both_baselines_give_the_first_token_the_same_undiscounted_return(golden):
    paper = advantages(golden, PAPER)
    released = advantages(golden, change(PAPER, process_baseline="released"))
    close(paper[:, 0], released[:, 0], atol=1e-14)
    assert (paper - released).abs().max() > 0.01


def test_the_scale_of_process_rewards_cancels_under_batch_norm(golden):
    close(advantages(golden, RELEASED, beta=1.0), advantages(golden, RELEASED), atol=1e-4)


def test_before_the_first_prm_update_process_rewards_of_0_leave_the_outcome(golden):
    found = advantages(golden, RELEASED, rewards=torch.zeros_like(golden.prm))
    close(found, golden["rloo.outcome_only.advantage"])


def test_returns_to_go_is_the_discounted_sum_of_what_follows():
    rewards = torch.randn(3, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for gamma in (1.0, 0.9, 0.0):
        for length in (1, 2, 3, 8, 13):
            wanted = [
                [
                    math.fsum(gamma ** (s - t) * row[s] for s in range(t, length))
                    for t in range(length)
                ]
                for row in rewards.tolist()
            ]
            found = returns_to_go(rewards[:, :length], gamma)
            close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-14)


def test_returns_to_go_leaves_its_input_alone():
    rewards = torch.ones(1, 4)
    assert returns_to_go(rewards, 1.0).tolist() == [[4, 3, 2, 1]]
    assert rewards.tolist() == [[1, 1, 1, 1]]


def test_batch_norm_makes_the_largest_return_of_the_whole_batch_1():
    rewards = torch.tensor([[1.0, -2.0, 0.0], [3.0, -8.0, 1.0]], dtype=torch.float64)
    close(batch_norm(rewards), rewards / (7 + 1e-6), atol=1e-15)


def test_normalising_and_whitening_see_the_whole_batch(golden):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, 1.0)
    half = prime_advantages(rewards[:4], golden.outcomes[:4], golden.mask[:4], 4, RELEASED)
    assert (half - golden["rloo.released.advantage"][:4]).abs().max() > 0.1


def test_whitened_advantages_have_mean_0_and_variance_1(golden):
    tokens = advantages(golden, RELEASED)[golden.mask]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-14)
    assert tokens.var().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("options", [RELEASED, PAPER])
def test_the_order_of_groups_does_not_matter(golden, options):
    rows = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    found = prime_advantages(rewards[rows], golden.outcomes[rows], golden.mask[rows], 4, options)
    close(found, advantages(golden, options)[rows], atol=1e-14)


@pytest.mark.parametrize("options", [RELEASED, PAPER])
def test_the_order_within_a_group_does_not_matter(golden, options):
    rows = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    found = prime_advantages(rewards[rows], golden.outcomes[rows], golden.mask[rows], 4, options)
    close(found, advantages(golden, options)[rows], atol=1e-14)


@pytest.mark.parametrize("options", [RELEASED, PAPER, change(PAPER, gamma=0.9)])
def test_more_padding_changes_nothing(golden, widen, options):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    found = prime_advantages(widen(rewards), golden.outcomes, widen(golden.mask), 4, options)
    close(found[:, :7], advantages(golden, options), atol=1e-14)
    assert found[:, 7:].abs().max() == 0


@pytest.mark.parametrize("options", [RELEASED, PAPER])
def test_garbage_on_padding_changes_nothing(golden, spoil, options):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, golden.beta)
    found = advantages(golden, options, rewards=spoil(rewards, golden.mask))
    assert torch.equal(found, advantages(golden, options))
    assert found[~golden.mask].abs().max() == 0


def test_advantages_carry_no_gradient(golden):
    prm = golden.prm.clone().requires_grad_()
    rewards = implicit_rewards(prm, golden.ref, golden.mask, golden.beta)
    assert not advantages(golden, RELEASED, rewards=rewards).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precisions_are_computed_in_float32(golden, dtype):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, 1.0).to(dtype)
    found = prime_advantages(rewards, golden.outcomes.float(), golden.mask, 4, RELEASED)
    assert found.dtype == torch.float32
    wanted = advantages(golden, RELEASED, rewards=rewards.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)


def test_float64_rewards_with_float32_outcomes_stay_float64(golden):
    rewards = implicit_rewards(golden.prm, golden.ref, golden.mask, 1.0)
    found = prime_advantages(rewards, golden.outcomes.float(), golden.mask, 4, RELEASED)
    close(found, golden["rloo.released.advantage"], atol=1e-6)


def test_operations_do_not_grow_with_the_rows_and_by_as_many_with_each_doubling_of_the_length():
    def count(rows, columns):
        mask = torch.ones(rows, columns).bool()
        options = change(RELEASED, gamma=0.9)
        with torch.autograd.profiler.profile() as record:
            prime_advantages(mask.float(), mask[:, 0].float(), mask, 4, options)
        return len(record.function_events)

    small, twice, four_times = count(8, 64), count(8, 128), count(8, 256)
    assert count(256, 64) == small
    assert four_times - twice == twice - small


@pytest.mark.parametrize(
    ("rows", "group_size", "message"),
    [
        (8, 1, r"found group_size 1, wanted at least 2.*rollout\.group_size"),
        (8, 0, r"found group_size 0, wanted at least 2"),
        (8, 3, r"found .*\[8\] and group_size 3, wanted .*multiple.*rollout\.group_size"),
    ],
)
def test_groups_that_leave_one_out_cannot_use_are_refused(golden, rows, group_size, message):
    with pytest.raises(ValueError, match=message):
        prime_advantages(golden.prm, golden.outcomes, golden.mask, group_size, RELEASED)


def test_shapes_that_differ_are_refused(golden):
    with pytest.raises(ValueError, match=r"process_rewards: found shape \[8, 6\], wanted \[8, 7\]"):
        prime_advantages(golden.prm[:, :6], golden.outcomes, golden.mask, 4, RELEASED)
    with pytest.raises(ValueError, match=r"outcome_rewards: found shape \[4\], wanted \[8\]"):
        prime_advantages(golden.prm, golden.outcomes[:4], golden.mask, 4, RELEASED)


def test_an_empty_response_is_refused(golden):
    mask = golden.mask.clone()
    mask[5] = False
    with pytest.raises(ValueError, match=r"1 rows without a token \(first: \[5\]\)"):
        prime_advantages(golden.prm, golden.outcomes, mask, 4, RELEASED)


def test_missing_process_rewards_are_refused(golden):
    with pytest.raises(ValueError, match=r"no process rewards .*advantage\.process_weight = 0"):
        prime_advantages(None, golden.outcomes, golden.mask, 4, RELEASED)


@pytest.mark.parametrize("with_prm", [False, True])
def test_an_ended_wrong_answer_is_told_off_though_many_tokens_were_cut(with_prm):
    """Whitened with the cut rows' 3072 tokens at -1, a wrong answer of 300 would gain 0.32.

    Half of the groups: one cut, three right; the others: one right, three wrong; K = 4, RLOO.
    """
    lengths = torch.tensor([3072, 300, 300, 300] + [300] * 4)
    mask = torch.arange(3072) < lengths[:, None]
    outcomes = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    learns = torch.tensor([False] + [True] * 7)
    options = change(RELEASED, process_weight=1e-9 if with_prm else 0.0)
    rewards = torch.zeros(mask.shape, dtype=torch.float64) if with_prm else None
    found = prime_advantages(rewards, outcomes, mask, 4, options, None, learns)
    # Each outcome less the mean of the others', the cut row's 0 included.
    plain = torch.tensor([1 / 3] * 3 + [1.0] + [-1 / 3] * 3, dtype=torch.float64)
    deviation = plain.repeat_interleave(300).std()
    wanted = (plain - plain.mean()) / deviation
    close(found[1:, 0], wanted, atol=1e-6)
    close(found[1:, 299], wanted, atol=1e-6)
    assert found[5, 0] < -0.9
    trained = found[mask & learns[:, None]]
    assert trained.mean().abs() < 1e-9
    assert trained.std() == pytest.approx(1.0, abs=1e-6)
    every = prime_advantages(rewards, outcomes, mask, 4, options)
    assert every[5, 0] > 0.3, "the case does show what is to be avoided"
