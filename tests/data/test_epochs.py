"""Shuffled epochs that go on where a checkpoint left them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import pytest

from megatron_prime.data.epochs import Epochs
from megatron_prime.data.rows import DataError


def stream(items=range(12), count=4, seed=3):
    return Epochs(list(items), count, seed, str, "numbers, wanted at least some.knob")


def test_every_epoch_has_each_item_once_in_an_order_of_its_own():
    numbers = stream()
    batches = [numbers.take() for _ in range(9)]
    assert {len(batch) for batch in batches} == {4}
    epochs = [list(chain(*batches[start : start + 3])) for start in (0, 3, 6)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(12))
    assert len({tuple(epoch) for epoch in [list(range(12)), *epochs]}) == 4
    assert numbers.epochs == 3


def test_the_seed_fixes_the_order():
    def first(seed):
        numbers = stream(seed=seed)
        return [numbers.take() for _ in range(6)]

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_an_incomplete_mini_batch_is_left_out():
    numbers = stream(range(7), 3, 0)
    first, second, third = (numbers.take() for _ in range(3))
    assert not set(first) & set(second), "6 of 7 in the first epoch"
    assert len(set(third)) == 3


def test_too_few_are_refused():
    with pytest.raises(DataError, match=r"found 2 numbers, wanted at least some\.knob = 3; lower"):
        stream([1, 2], 3)


@pytest.mark.parametrize("taken", range(8))
def test_it_goes_on_where_it_was(taken):
    numbers = stream()
    for _ in range(taken):
        numbers.take()
    state = json.loads(json.dumps(numbers.state_dict()))
    wanted = [numbers.take() for _ in range(5)]
    again = stream()
    again.load_state_dict(state)
    assert [again.take() for _ in range(5)] == wanted


def test_other_items_are_refused():
    state = stream().state_dict()
    for others in (range(13), range(1, 13)):
        with pytest.raises(DataError, match=r"on 12 examples .*; restore the data"):
            stream(others).load_state_dict(state)
