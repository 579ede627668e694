from fractions import Fraction

import pytest

from megatron_prime.verify.math_notation import tokenize
from megatron_prime.verify.math_units import split_unit


@pytest.mark.parametrize(
    ("text", "factor", "powers"),
    [
        (r"5\text{ cm}", Fraction(1, 100), {"m": 1}),
        (r"5\text{ cm}^2", Fraction(1, 10_000), {"m": 2}),
        (r"5\text{ square inches}", Fraction("0.0254") ** 2, {"m": 2}),
        (r"5\text{ cubic feet}", Fraction("0.3048") ** 3, {"m": 3}),
        (r"5\text{ liters}", Fraction(1, 1000), {"m": 3}),
        (r"5\text{ meters per second squared}", Fraction(1), {"m": 1, "s": -2}),
        (r"60\text{ mph}", Fraction("1609.344") / 3600, {"m": 1, "s": -1}),
        (r"60\text{ miles per hour}", Fraction("1609.344") / 3600, {"m": 1, "s": -1}),
        (r"\$5", Fraction(1), {"dollar": 1}),
        (r"5\text{ cents}", Fraction(1, 100), {"dollar": 1}),
        (r"5\text{ apples}", Fraction(1), {"apple": 1}),
        ("90°", Fraction(1), {"degree": 1}),
    ],
)
def test_units(text, factor, powers):
    measured, unit, is_percent = split_unit(tokenize(text))
    assert measured in (("5",), ("60",), ("90",))
    assert (unit.factor, dict(unit.powers), is_percent) == (factor, powers, False)


@pytest.mark.parametrize(
    ("text", "measured", "is_percent"),
    [
        ("5", ("5",), False),
        (r"5\text{ units}", ("5",), False),
        (r"5\,\%", ("5",), True),
        (r"5 \text{ is not it}", ("5", '"is not it'), False),
        (r"\sin 30^\circ", (r"\sin", "30", "°"), False),
        (r"\text{cm}", ('"cm',), False),
    ],
)
def test_what_has_no_unit(text, measured, is_percent):
    assert split_unit(tokenize(text)) == (measured, None, is_percent)
