"""Plans keep their promises on random cases, and waste little on typical ones."""

import random

import pytest

from megatron_prime.data.packing import plan_micro_batches


def loads(plan, lengths):
    return [[sum(lengths[row] for row in pack) for pack in share] for share in plan]


def random_case(seed):
    rng = random.Random(seed)
    dp_size, multiple = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 1, 2, 4])
    rows = dp_size * multiple * rng.randint(1, 12)
    longest = rng.choice([10, 300, 3000])
    lengths = [max(1, int(longest * rng.random() ** rng.choice([1, 3]))) for _ in range(rows)]
    max_tokens = rng.randint(longest, 6 * longest)
    return lengths, dp_size, max_tokens, rng.randint(1, 4), multiple


@pytest.mark.parametrize("seed", range(300))
def test_plans_keep_their_promises(seed):
    lengths, dp_size, max_tokens, stages, multiple = random_case(seed)
    try:
        plan = plan_micro_batches(lengths, dp_size, max_tokens, stages, multiple)
    except ValueError:  # too few rows: even a pack for each row would not have been enough
        assert multiple > 1
        assert sum(lengths) > 0.4 * max_tokens * dp_size * (len(lengths) // dp_size - multiple)
        return
    assert len(plan) == dp_size
    rows = [row for share in plan for pack in share for row in pack]
    assert sorted(rows) == list(range(len(lengths)))
    (count,) = {len(share) for share in plan}
    assert count % multiple == 0
    for share in plan:
        assert all(share), "no micro-batch is empty"
    of_packs = loads(plan, lengths)
    assert max(max(share) for share in of_packs) <= max_tokens
    of_ranks = [sum(share) for share in of_packs]
    assert max(of_ranks) - min(of_ranks) <= max(lengths)
    assert plan == plan_micro_batches(lengths, dp_size, max_tokens, stages, multiple)


@pytest.mark.parametrize("seed", range(20))
def test_a_typical_step_is_balanced_between_packs_and_ranks(seed):
    rng = random.Random(seed)
    lengths = [min(3500, int(rng.lognormvariate(7, 0.5)) + 100) for _ in range(256)]
    plan = plan_micro_batches(lengths, 8, 8192)
    of_packs = loads(plan, lengths)
    flat = [load for share in of_packs for load in share]
    assert max(flat) < 1.04 * min(flat)
    assert max(map(sum, of_packs)) < 1.01 * min(map(sum, of_packs))
    # Hardly more packs than the cap asks for.
    assert len(flat) <= 8 * (-(-sum(lengths) // (8 * 8192)) + 1)


def test_equal_rows_are_spread_evenly_and_not_into_full_and_rest():
    plan = plan_micro_batches([1000] * 20, dp_size=2, max_tokens=8000)
    assert [[len(pack) for pack in share] for share in plan] == [[5, 5], [5, 5]]


def test_a_pipeline_gets_a_micro_batch_for_each_stage_where_that_is_faster():
    def counts(rows, **wanted):
        return [len(share) for share in plan_micro_batches(rows, 2, 1000, **wanted)]

    assert counts([5] * 16) == [1, 1]
    assert counts([5] * 16, stages=4) == [4, 4]
    assert counts([5] * 4, stages=4) == [2, 2]
    assert counts([5] * 16, stages=3, multiple=2) == [4, 4]
    # One row is nearly all there is: more packs would only be filled up to it.
    assert counts([900, 900, *[5] * 14], stages=4) == [1, 1]


def test_a_row_above_the_cap_is_named():
    with pytest.raises(ValueError, match=r"row 1 of 30 tokens.* micro_batch_tokens = 20; raise"):
        plan_micro_batches([10, 30], 1, 20)


@pytest.mark.parametrize(("rows", "multiple"), [(3, 1), (7, 2)])
def test_too_few_rows_are_an_error(rows, multiple):
    with pytest.raises(ValueError, match=rf"found {rows} rows for 4 data-parallel ranks"):
        plan_micro_batches([10] * rows, 4, 20, multiple=multiple)
