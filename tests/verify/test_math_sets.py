import itertools
import random
from fractions import Fraction

import pytest

from megatron_prime.verify.math_numbers import same
from megatron_prime.verify.math_sets import LINE, Combined, Points, Span, equal_sets
from megatron_prime.verify.math_tree import Number, Symbol


def number(value):
    return Number(Fraction(value))


def members(real_set, grid):
    """By the definition, on a grid of rationals: an independent check."""
    if isinstance(real_set, Points):
        return {x for x in grid if any(x == node.value for node in real_set.nodes)}
    if isinstance(real_set, Span):
        low = [
            x
            for x in grid
            if real_set.low is None
            or x > real_set.low.value
            or (x == real_set.low.value and real_set.low_closed)
        ]
        return {x for x in low if real_set.high is None or x < real_set.high.value
                or (x == real_set.high.value and real_set.high_closed)}  # fmt: skip
    parts = [members(part, grid) for part in real_set.parts]
    if real_set.name == "or":
        return set().union(*parts)
    return parts[0] & parts[1] if real_set.name == "and" else parts[0] - parts[1]


def drawn(draw, depth):
    kind = draw.randrange(6) if depth else draw.randrange(3)
    if kind == 0:
        return Points(tuple(number(draw.randint(0, 3)) for _ in range(draw.randint(1, 2))))
    if kind < 3:
        low, high = sorted(draw.sample(range(4), 2))
        ends = [None if draw.random() < 0.2 else number(end) for end in (low, high)]
        return Span(*ends, draw.random() < 0.5, draw.random() < 0.5)
    name = ("or", "and", "not")[kind - 3]
    return Combined(name, (drawn(draw, depth - 1), drawn(draw, depth - 1)))


def test_equality_is_that_of_members():
    draw = random.Random(5)
    grid = [Fraction(n, 4) for n in range(-8, 24)]
    sets = [drawn(draw, 2) for _ in range(60)]
    equal = 0
    for one, other in itertools.product(sets, sets):
        expected = members(one, grid) == members(other, grid)
        assert equal_sets(one, other, same) == expected, (one, other)
        equal += expected
    assert 60 < equal < 2500, "both happen"


@pytest.mark.parametrize(("closed", "equal"), [(False, True), (True, False)])
def test_ends_with_variables_must_be_written_alike(closed, equal):
    one = Span(Symbol("a"), None)
    assert equal_sets(one, Span(Symbol("a"), None, closed), same) is equal
    assert not equal_sets(one, Span(Symbol("b"), None), same)
    assert not equal_sets(one, LINE, same)
