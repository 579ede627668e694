"""Numbers as they are written: decimals, repeating decimals, 3.2e5."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_prime.verify.math_notation import UnreadableError

MAX_DIGITS = 400
_NUMBER = re.compile(r"\.?[0-9]")


def number(token: str) -> Fraction:
    """The value of a number's token."""
    if len(token) > MAX_DIGITS:
        raise UnreadableError("a number of too many digits")
    if "(" in token:
        digits, _, period = token.rstrip(")").partition("(")
        scale = 10 ** len(digits.partition(".")[2])
        repeated = Fraction(int(period), (10 ** len(period) - 1) * scale)
        return Fraction(digits.rstrip(".") or 0) + repeated
    mantissa, _, exponent = token.lower().partition("e")
    if len(exponent) > 4:
        raise UnreadableError("a number with too large an exponent")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def is_number(token: str | None) -> bool:
    """Whether a token is a number."""
    return token is not None and _NUMBER.match(token) is not None
