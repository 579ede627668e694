"""Which answers are one vote."""

from __future__ import annotations

import pytest

from megatron_prime.benchmarks.answers import answer_of, normalized


@pytest.mark.parametrize(
    "same",
    [
        ["1234", "1,234", " 1234 ", "$1234$", "1234.0", "1234.", "x=1234", r"1234\text{}"],
        [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac12", r"\frac{1} {2}"],
        [r"\left(1, 2\right)", "(1,2)", r"(1,\,2)", r"\left( 1,2 \right)"],
        ["45^\\circ", "45^{\\circ}", "45"],
        [r"\text{Evelyn}", "Evelyn", r"\mathrm{Evelyn}"],
        ["50\\%", "50%", "50"],
    ],
)
def test_notation_makes_no_other_vote(same):
    assert len({normalized(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("1/2", "0.5"), ("(1,2)", "[1,2]"), ("12", "1.2"), ("x", "y"), ("1,23", "123"), ("-4", "4")],
)
def test_values_do(one, other):
    assert normalized(one) != normalized(other)


def test_arrows_are_not_sizes_of_brackets():
    assert normalized(r"x\rightarrow 2") == r"x\rightarrow2"


def test_a_vote_is_the_boxed_answer_of_mathematics_alone():
    assert answer_of(r"so \boxed{1} or rather \boxed{\dfrac12}", "math") == r"\frac{1}{2}"
    assert answer_of("it is 4", "math") is None
    assert answer_of(r"\boxed{}", "math") is None
    assert answer_of(r"\boxed{$\,$}", "math") is None
    assert answer_of(r"\boxed{4}", "code") is None
