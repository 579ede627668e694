import random

import pytest

from megatron_prime.data.packing import plan_micro_batches


def padded(micro_batch, lengths):
    return len(micro_batch) * max(lengths[row] for row in micro_batch)


def random_case(seed):
    rng = random.Random(seed)
    dp_size, unit = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 1, 2, 4])
    rows = dp_size * unit * rng.randint(1, 12)
    longest = rng.choice([10, 300, 3000])
    lengths = [max(1, int(longest * rng.random() ** rng.choice([1, 3]))) for _ in range(rows)]
    max_tokens = rng.randint(max(lengths), 6 * longest)
    return lengths, dp_size, max_tokens, rng.randint(1, 4), unit


@pytest.mark.parametrize("seed", range(300))
def test_plans_keep_their_promises(seed):
    lengths, dp_size, max_tokens, least, unit = random_case(seed)
    plan = plan_micro_batches(lengths, dp_size, max_tokens, least, unit)

    assert len(plan) == dp_size
    rows = [row for share in plan for micro_batch in share for row in micro_batch]
    assert sorted(rows) == list(range(len(lengths)))
    (count,) = {len(share) for share in plan}
    assert count >= min(least, len(lengths) // dp_size)
    for share in plan:
        assert all(share), "no micro-batch is empty"
        assert all(padded(micro_batch, lengths) <= max_tokens for micro_batch in share)
        in_order = [lengths[row] for micro_batch in share for row in micro_batch]
        assert in_order == sorted(in_order, reverse=True), "neighbours in length share a batch"
    home = {row: rank for rank, share in enumerate(plan) for batch in share for row in batch}
    assert all(home[row] == home[row - row % unit] for row in home)

    units = [sum(lengths[row : row + unit]) for row in range(0, len(lengths), unit)]
    loads = [sum(lengths[row] for batch in share for row in batch) for share in plan]
    assert max(loads) - min(loads) <= max(units) - min(units)
    assert plan == plan_micro_batches(lengths, dp_size, max_tokens, least, unit)


@pytest.mark.parametrize("seed", range(20))
def test_a_typical_step_is_balanced_and_little_is_padding(seed):
    rng = random.Random(seed)
    lengths = [min(3500, int(rng.lognormvariate(7, 0.5)) + 100) for _ in range(256)]
    plan = plan_micro_batches(lengths, 8, 8192)
    loads = [sum(padded(batch, lengths) for batch in share) for share in plan]
    assert max(loads) < 1.05 * min(loads)
    assert sum(loads) < 1.15 * sum(lengths)


def test_equal_rows_are_spread_evenly_and_not_into_full_and_rest():
    plan = plan_micro_batches([1000] * 20, dp_size=2, max_tokens=8000)
    assert [[len(batch) for batch in share] for share in plan] == [[5, 5], [5, 5]]


def test_a_small_plan_by_hand():
    plan = plan_micro_batches([1, 9, 2, 8, 3, 7], dp_size=2, max_tokens=18)
    # Dealt: 9 and 8; 7 to the lesser load, 3 to the other; 2 and 1: {9, 3, 2} and {8, 7, 1}.
    # {8, 7, 1} is cut where the larger part is smaller: 8 | 7 1 (14 tokens), not 8 7 | 1 (16).
    assert plan == [[[1], [4, 2]], [[3], [5, 0]]]


def test_the_fewest_micro_batches_are_made_unless_more_are_wanted():
    lengths = [10] * 8
    assert [len(share) for share in plan_micro_batches(lengths, 2, 40)] == [1, 1]
    assert [len(share) for share in plan_micro_batches(lengths, 2, 39)] == [2, 2]
    assert [len(share) for share in plan_micro_batches(lengths, 2, 40, 3)] == [3, 3]
    assert [len(share) for share in plan_micro_batches(lengths, 2, 40, 9)] == [4, 4]


def test_a_row_above_the_cap_names_the_knob():
    with pytest.raises(ValueError, match=r"row 1 of 101 tokens.*raise micro_batch_tokens"):
        plan_micro_batches([5, 101], 1, 100)


@pytest.mark.parametrize(
    ("lengths", "max_tokens"),
    [([5, 5, 5], 100), ([], 100), ([5] * 6, 5)],
)
def test_a_rank_without_a_micro_batch_is_refused(lengths, max_tokens):
    with pytest.raises(ValueError, match=r"mini_batch_size = \d .*4 data-parallel ranks.*multiple"):
        plan_micro_batches(lengths, 4, max_tokens)


def test_rows_that_are_no_whole_units_are_refused():
    with pytest.raises(ValueError, match="found 6 rows, wanted a multiple of the unit of 4"):
        plan_micro_batches([5] * 6, 1, 100, unit=4)
