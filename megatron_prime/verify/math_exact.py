"""The exact value of a constant, where it is rational and that can be seen.

Whatever would have more than some ten thousand bits raises TooLargeError before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, isqrt

from megatron_prime.verify.math_notation import UnreadableError
from megatron_prime.verify.math_tree import Node, Number, Symbol

MAX_BITS = 20_000


class TooLargeError(UnreadableError):
    """A number that nobody can write down."""


def exact(node: Node) -> Fraction | None:
    """The value of a constant if it is seen to be rational, else None."""
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return None
    args = [exact(arg) for arg in node.args]
    known = [arg for arg in args if arg is not None]
    if len(known) < len(args):
        return None
    if node.name in ("+", "*"):
        total = known[0]
        for part in known[1:]:
            total = _bounded(total + part if node.name == "+" else total * part)
        return total
    evaluate = _EXACT.get(node.name)
    return None if evaluate is None else evaluate(*known)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * MAX_BITS:
        raise TooLargeError("a number beyond all bounds")
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and bits * abs(exponent) > MAX_BITS:
        raise TooLargeError("a power beyond all bounds")
    if base == 0 and exponent <= 0:
        return None
    return base ** (int(exponent) if bits > 1 else int(exponent) % 2)


def _exact_root(value: Fraction, degree: Fraction) -> Fraction | None:
    if degree != 2 or value < 0:
        return None
    above, below = isqrt(value.numerator), isqrt(value.denominator)
    root = Fraction(above, below)
    return root if root * root == value else None


def _exact_factorial(value: Fraction) -> Fraction | None:
    whole = value.denominator == 1 and 0 <= value <= 1000
    return Fraction(factorial(int(value))) if whole else None


def _exact_binomial(n: Fraction, k: Fraction) -> Fraction | None:
    whole = n.denominator == k.denominator == 1 and 0 <= k <= n <= 2000
    return Fraction(comb(int(n), int(k))) if whole else None


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "^": _exact_power,
    "root": _exact_root,
    "abs": abs,
    "floor": lambda value: Fraction(value // 1),
    "ceil": lambda value: Fraction(-(-value // 1)),
    "!": _exact_factorial,
    "binom": _exact_binomial,
}
