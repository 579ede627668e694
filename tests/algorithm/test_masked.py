from __future__ import annotations

import statistics

import pytest
import torch

from megatron_prime.algorithm.masked import (
    at_least_float32,
    by_group,
    check_rows,
    check_tokens,
    masked_mean,
    masked_sum,
    masked_variance,
    whiten,
    zero_padding,
)

NAN = float("nan")
VALUES = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN], [5.0, 6.0, 9.0]], dtype=torch.float64)
MASK = ~VALUES.isnan()
INSIDE = [1.0, 2.0, 4.0, 5.0, 6.0, 9.0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_numbers_are_float32_at_least(given, wanted):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == wanted


def test_zero_padding_broadcasts_and_silences_garbage_in_values_and_gradients():
    values = torch.tensor([[3.0], [NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    padded = zero_padding(values, mask)
    padded.square().sum().backward()
    assert padded.tolist() == [[3, 3, 0], [0, 0, 0]]
    assert values.grad.tolist() == [[12.0], [0.0]]


def test_sums_and_means_see_only_the_inside_of_the_mask():
    assert masked_sum(VALUES, MASK).item() == 27
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3, 4, 20]
    assert masked_mean(VALUES, MASK).item() == 4.5
    assert masked_mean(VALUES, MASK, dim=1).tolist() == pytest.approx([1.5, 4, 20 / 3])


def test_variance_is_unbiased_and_0_for_a_single_value():
    assert masked_variance(VALUES, MASK).item() == pytest.approx(statistics.variance(INSIDE))
    assert masked_variance(VALUES[1:2], MASK[1:2]).item() == 0


def test_whitening_subtracts_the_mean_and_divides_by_the_unbiased_deviation():
    white = whiten(VALUES, MASK)
    deviation = (statistics.variance(INSIDE) + 1e-8) ** 0.5
    wanted = [(x - statistics.mean(INSIDE)) / deviation for x in INSIDE]
    assert white[MASK].tolist() == pytest.approx(wanted, abs=1e-14)
    assert white[~MASK].abs().max() == 0


def test_the_epsilon_of_whitening_stands_inside_the_root():
    white = whiten(torch.tensor([[0.0, 2e-4]], dtype=torch.float64), torch.ones(1, 2).bool())
    assert white[0, 1].item() == pytest.approx(1e-4 / (2e-8 + 1e-8) ** 0.5)


def test_equal_values_whiten_to_0():
    assert whiten(torch.full((2, 3), 5.0), torch.ones(2, 3).bool()).abs().max() == 0


def test_by_group_keeps_adjacent_rows_together():
    assert by_group(torch.arange(6), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("shape", "group_size"), [((7,), 4), ((2, 4), 4), ((4,), 0)])
def test_by_group_refuses_partial_groups(shape, group_size):
    with pytest.raises(ValueError, match=r"found values of shape .*wanted .*rollout\.group_size"):
        by_group(torch.zeros(shape), group_size)


def test_a_mask_that_is_not_bool_is_refused():
    with pytest.raises(ValueError, match=r"found torch\.int64 \[3, 3\], wanted torch\.bool"):
        check_tokens(MASK.long())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (1, 2, 3)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"wanted torch\.bool \[N, T\]"):
        check_tokens(torch.ones(shape, dtype=torch.bool))


def test_a_tensor_of_another_shape_is_named():
    with pytest.raises(
        ValueError, match=r"old_logprobs: found shape \[3, 2\], wanted \[3, 3\].*pad"
    ):
        check_tokens(MASK, logprobs=VALUES, old_logprobs=VALUES[:, :2])


def test_empty_rows_are_named():
    mask = torch.tensor([[True, False], [False, False], [True, True], [False, False]])
    with pytest.raises(
        ValueError, match=r"found 2 rows without a token \(first: \[1, 3\]\), wanted"
    ):
        check_tokens(mask)


@pytest.mark.parametrize("shape", [(2,), (3, 1)])
def test_row_values_must_be_one_per_row(shape):
    with pytest.raises(ValueError, match=r"outcome_rewards: found shape .*wanted \[3\]"):
        check_rows(MASK, outcome_rewards=torch.zeros(shape))
