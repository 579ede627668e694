r"""When are two expressions the same? Exact where rational, else by numbers of many digits.

Two rational constants are compared as fractions. Otherwise both sides are evaluated, with 30 digits
first: most wrong answers end there. A difference that might be rounding is computed again with some
hundred digits more than the answer has: rounding shrinks with the precision, a difference stays. So
1/3 and a thousand digits of it differ.

With variables, both sides must agree at some points of a fixed list. Real points come first, of
both signs: sqrt(x^2) is |x| and not x. Where one side is not real (a logarithm of a negative
number) the point doesn't count; if none counts, whole and at last complex numbers are tried.

Towers of powers, factorials and the like that leave the range of 10^±6000 raise TooLargeError
before they cost time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import MPContext

from megatron_prime.verify.math_exact import MAX_BITS, TooLargeError, exact
from megatron_prime.verify.math_notation import UnreadableError, words
from megatron_prime.verify.math_tree import Node, Number, Symbol, symbols
from megatron_prime.verify.math_tree import digits as digits_of

FEW_DIGITS = 30
MAX_SYMBOLS = 12
Point = dict[str, Any]


class _UndefinedError(ArithmeticError):
    """Without a (real) value at this point."""


def same(one: Node, other: Node) -> bool:
    """Whether two expressions are equal as functions of their variables."""
    if one == other:
        return True
    names = sorted(symbols(one) | symbols(other))
    if not names:
        fractions = exact(one), exact(other)
        if fractions[0] is not None and fractions[1] is not None:
            return fractions[0] == fractions[1]
        agreed = _agree(one, other, {}, real=True)
        return bool(_agree(one, other, {}, real=False) if agreed is None else agreed)
    if len(names) > MAX_SYMBOLS:
        raise UnreadableError("too many variables")
    for points, real in _stages(len(names)):
        met = 0
        for values in points:
            agreed = _agree(one, other, dict(zip(names, values, strict=True)), real, met == 0)
            if agreed is False:
                return False
            met += agreed is True
            if met == 4:
                return True
        if met >= 2:
            return True
    return False


@lru_cache(maxsize=64)
def _stages(count: int) -> list[tuple[list[tuple[Fraction, ...]] | list[tuple[Any, ...]], bool]]:
    """Points for `count` variables: real, whole, complex."""
    draw = random.Random(20_250_203)

    def fraction() -> Fraction:
        return Fraction(draw.randint(400_000, 1_900_000), 1_000_003)

    real = [
        tuple(fraction() * draw.choice((1, 1, 1 if turn < 2 else -1)) for _ in range(count))
        for turn in range(12)
    ]
    real[2] = tuple(-value for value in real[2])
    whole = [tuple(Fraction(draw.randint(1, 12)) for _ in range(count)) for _ in range(8)]
    imaginary = [tuple((fraction(), fraction()) for _ in range(count)) for _ in range(6)]
    return [(real, True), (whole, True), (imaginary, False)]


def _agree(one: Node, other: Node, point: Point, real: bool, surely: bool = True) -> bool | None:
    """Whether both have the same value at a point; None if one has none."""
    try:
        low = _difference(one, other, point, real, FEW_DIGITS)
        if low[0] > 1e-12 * low[1] and low[0] > 1e-12:
            return False
        if not surely:
            return True
        digits = 120 + 2 * (digits_of(one) + digits_of(other))
        high = _difference(one, other, point, real, digits)
    except (_UndefinedError, ZeroDivisionError):
        return None
    if high[0] <= _context(digits).mpf(10) ** (-digits // 2) * high[1]:
        return True
    return bool(low[0] > 0 and high[0] < low[0] * _context(digits).mpf(10) ** -40)


def _difference(one: Node, other: Node, point: Point, real: bool, digits: int) -> tuple[Any, Any]:
    """The distance of two values, and the larger one's size."""
    a, b = (value_at(node, point, real, digits) for node in (one, other))
    return abs(a - b), max(abs(a), abs(b))


@lru_cache(maxsize=16)
def _context(digits: int) -> Any:
    context = MPContext()
    context.dps = digits
    return context


def real_value(node: Node, digits: int = 50) -> Any:
    """The value of a real constant; UnreadableError if it isn't one."""
    if symbols(node):
        raise UnreadableError("not a constant")
    try:
        return value_at(node, {}, True, digits)
    except (_UndefinedError, ZeroDivisionError) as error:
        raise UnreadableError("not a real number") from error


def value_at(node: Node, point: Point, real: bool, digits: int) -> Any:
    """The value with so many digits; _UndefinedError or ZeroDivisionError if there is none."""
    context = _context(digits)
    if isinstance(node, Number):
        return context.mpf(node.value.numerator) / node.value.denominator
    if isinstance(node, Symbol):
        value = point[node.name]
        if isinstance(value, tuple):
            return context.mpc(*(context.mpf(v.numerator) / v.denominator for v in value))
        return context.mpf(value.numerator) / value.denominator
    args = [value_at(arg, point, real, digits) for arg in node.args]
    result = _OPERATIONS[node.name](context, real, *args)
    if not context.isfinite(result):
        raise _UndefinedError
    if result != 0 and abs(context.mag(result)) > MAX_BITS:
        raise TooLargeError("a number beyond all bounds")
    if real and isinstance(result, context.mpc):
        raise _UndefinedError
    return result


def _power(context: Any, real: bool, base: Any, exponent: Any) -> Any:
    if base == 0 and context.re(exponent) <= 0:
        raise ZeroDivisionError
    if base != 0 and abs(exponent) * (abs(context.mag(base)) + 1) > MAX_BITS:
        raise TooLargeError("a power beyond all bounds")
    if real and base < 0 and exponent != int(exponent):
        return _odd_root(context, base, exponent)
    whole = context.isint(exponent)
    return context.power(base, int(context.re(exponent)) if whole else exponent)


def _odd_root(context: Any, base: Any, exponent: Any) -> Any:
    """(-8)^(1/3) = -2, as in school; undefined unless the exponent has a small odd denominator."""
    for below in (3, 5, 7, 9):
        above = context.nint(exponent * below)
        if abs(exponent * below - above) < context.mpf(10) ** (5 - context.dps):
            return (-1) ** int(above) * context.power(-base, exponent)
    raise _UndefinedError


def _root(context: Any, real: bool, value: Any, degree: Any) -> Any:
    if degree == 0:
        raise ZeroDivisionError
    if real and value < 0:
        if not (context.isint(degree) and int(degree) % 2):
            raise _UndefinedError
        return -context.power(-value, 1 / degree)
    if degree == 2:
        return context.sqrt(value)
    return context.power(value, 1 / degree) if value != 0 else value


def _logarithm(context: Any, real: bool, value: Any, base: Any = 10) -> Any:
    if value == 0 or base == 1 or base == 0 or (real and (value < 0 or base < 0)):
        raise _UndefinedError
    return context.ln(value) / context.ln(base)


def _factorial(context: Any, real: bool, value: Any) -> Any:
    if abs(value) > 2000 or (context.isint(value) and value < 0):
        raise TooLargeError("a factorial beyond all bounds")
    return context.gamma(value + 1)


def _binomial(context: Any, real: bool, n: Any, k: Any) -> Any:
    if max(abs(n), abs(k)) > 10_000:
        raise TooLargeError("a binomial coefficient beyond all bounds")
    return context.binomial(n, k)


def _floor(context: Any, real: bool, value: Any, up: bool = False) -> Any:
    if not real:
        raise _UndefinedError
    nearest = context.nint(value)
    if abs(value - nearest) < context.mpf(10) ** (-context.dps // 2):
        return nearest
    return context.ceil(value) if up else context.floor(value)


def _function(name: str, low: float | None = None, high: float | None = None) -> Callable[..., Any]:
    """A function of mpmath, in real mode on its domain alone."""

    def evaluate(context: Any, real: bool, value: Any) -> Any:
        if real and ((low is not None and value < low) or (high is not None and value > high)):
            raise _UndefinedError
        if context.mag(value) > 200 or (name in _GROWING and abs(value) > MAX_BITS):
            raise TooLargeError("an argument beyond all bounds")
        try:
            return getattr(context, name)(value)
        except ValueError as error:  # a pole
            raise _UndefinedError from error

    return evaluate


def _product(context: Any, real: bool, *factors: Any) -> Any:
    result = context.mpf(1)
    for factor in factors:
        result *= factor
    return result


_GROWING = ("exp", "sinh", "cosh")
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": lambda context, real, *terms: sum(terms, context.mpf(0)),
    "*": _product,
    "^": _power,
    "pi": lambda context, real: +context.pi,
    "e": lambda context, real: +context.e,
    "i": lambda context, real: context.mpc(0, 1),
    "root": _root,
    "abs": lambda context, real, value: abs(value),
    "floor": _floor,
    "ceil": lambda context, real, value: _floor(context, real, value, up=True),
    "!": _factorial,
    "binom": _binomial,
    "log": _logarithm,
    "ln": lambda context, real, value: _logarithm(context, real, value, context.e),
    "arcsin": _function("asin", -1, 1),
    "arccos": _function("acos", -1, 1),
    "arctan": _function("atan"),
    "arccot": _function("acot"),
    **{name: _function(name) for name in words("sin cos tan cot sec csc sinh cosh tanh exp")},
}
