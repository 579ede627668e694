import time
from fractions import Fraction

import pytest

from megatron_prime.verify.math_exact import TooLargeError, exact
from megatron_prime.verify.math_expression import parse_expression
from megatron_prime.verify.math_notation import UnreadableError, tokenize
from megatron_prime.verify.math_numbers import real_value, same


def tree(text):
    return parse_expression(tokenize(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac12", Fraction(1, 2)),
        (r"\frac1{2}", Fraction(1, 2)),
        (r"\frac{3}4x^0", None),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("1 4/5", Fraction(9, 5)),
        (r"2\frac{3}{2}", Fraction(3)),
        (r"2\cdot\frac{1}{2}", Fraction(1)),
        ("-2^2", Fraction(-4)),
        ("(-2)^2", Fraction(4)),
        ("2^{3^2}", Fraction(512)),
        ("10^-3", Fraction(1, 1000)),
        ("1/2/4", Fraction(1, 8)),
        ("6/2(1+2)", Fraction(9)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("0.0", Fraction(0)),
        (r"\sqrt{\frac{9}{4}}", Fraction(3, 2)),
        (r"\sqrt2", None),
        ("4!", Fraction(24)),
        (r"\binom{10}{3}", Fraction(120)),
        (r"|3-5|", Fraction(2)),
        (r"\lfloor -3.5 \rfloor", Fraction(-4)),
        (r"\lceil 3.2 \rceil", Fraction(4)),
    ],
)
def test_exact_values(text, value):
    assert exact(tree(text)) == value


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("(x+1)^{10}", "(x^2+2x+1)^5", True),
        ("(x+1)^{10}", "(x^2+2x+1)^5+10^{-15}", False),
        (r"\sin 2x", r"2\sin x\cos x", True),
        (r"\sin^2 x", r"(\sin x)^2", True),
        (r"\sin x^2", r"(\sin x)^2", False),
        (r"\sin^{-1} x", r"\arcsin x", True),
        (r"\sqrt{x^2}", "x", False),
        (r"\sqrt[3]{x^3}", "x", True),
        (r"\ln(x^2)", r"2\ln x", True),
        (r"\ln(-x)", r"\ln x", False),
        (r"(-1)^{2n}", "1", True),
        (r"(-1)^n", "1", False),
        (r"\frac{n!}{(n-2)!}", "n(n-1)", True),
        (r"\sqrt2+\sqrt3-\sqrt{5+2\sqrt6}", "0", True),
        (r"\sqrt2+\sqrt3-\sqrt{5+2\sqrt6}", "10^{-40}", False),
        (r"\pi", "3." + "1" * 300, False),
        ("e^{i\\pi}", "-1", True),
        ("i^2", "-1", True),
        (r"x_1+x_2", "x_2+x_1", True),
        ("x_1", "x_2", False),
        ("xy", "yx", True),
    ],
)
def test_same_means_equal_as_functions(one, other, equal):
    assert same(tree(one), tree(other)) is equal
    assert same(tree(other), tree(one)) is equal


def test_a_constant_and_many_of_its_digits_differ():
    from mpmath import mp

    with mp.workdps(350):
        digits = mp.nstr(mp.pi, 300)
    assert not same(tree(r"\pi"), tree(digits))
    assert not same(tree(r"\frac13"), tree("0." + "3" * 300))


@pytest.mark.parametrize(
    "text", ["9^{9^{9^9}}", "10^{10^{10}}", "((9!)!)!", "10^{9999999}", "e^{e^{e^{e^e}}}"]
)
def test_numbers_beyond_all_bounds_are_refused_at_once(text):
    started = time.process_time()
    with pytest.raises(TooLargeError):
        same(tree(text), tree(r"\sqrt{2}"))
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "text", ["", "+", "1+", "(1", "1)", r"\frac{1}", "1 2", "x^", "2^3^4^", r"\int x", "'", "5!!"]
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(UnreadableError):
        tree(text)


def test_a_real_value_is_refused_to_what_has_none():
    assert abs(real_value(tree(r"\sqrt2")) ** 2 - 2) < 1e-45
    for text in ("x", r"\sqrt{-1}", "1/0", r"\ln 0"):
        with pytest.raises(UnreadableError):
            real_value(tree(text))
