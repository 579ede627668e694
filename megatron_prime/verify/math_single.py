r"""Single values from tokens: expressions with units, numerals in a base, ratios and times."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_prime.verify.math_digits import is_number, number
from megatron_prime.verify.math_exact import TooLargeError
from megatron_prime.verify.math_expression import parse_expression
from megatron_prime.verify.math_notation import Tokens, UnreadableError, split
from megatron_prime.verify.math_tree import Node, Number, multiply
from megatron_prime.verify.math_types import Numeral, Ratio, Residue, Scalar, Time, Unread, Value
from megatron_prime.verify.math_units import SCALES, split_unit
from megatron_prime.verify.math_words import NUMBERS, number_word

_BASES = {name: base for base, name in enumerate(NUMBERS) if base > 1} | {"sixteen": 16}
_CLOCK = re.compile(r"([0-9]{1,2})(?::([0-5][0-9]))?([ap]m)?")


def read_ratio(tokens: Tokens) -> Value | None:
    """A ratio or a time of day."""
    written = "".join(tokens).replace('"', "").replace(".", "").lower() if len(tokens) < 10 else ""
    clock = _CLOCK.fullmatch(written)
    if clock and (clock[2] or clock[3]):
        return Time(int(clock[1]), int(clock[2] or 0), clock[3] or "")
    parts, colons = split(tokens, (":", '"to'))
    if not colons or len(parts) > 6 or not all(parts):
        return None
    return Ratio(tuple(parse_expression(part) for part in parts))


_NUMERAL = re.compile(r"(\()?([0-9][0-9A-Za-z]*|[0-9A-Za-z]+(?=\)))(?(1)\))_\{?([0-9]+|[a-z]+)\}?")


def read_residue(tokens: Tokens) -> Value | None:
    r"""`3 \pmod 7`."""
    place = next((i for i, token in enumerate(tokens) if token in (r"\pmod", r"\bmod", r"\mod")), 0)
    if not place:
        return None
    value = read_scalar(tokens[:place])
    if not isinstance(value, Scalar):
        return Unread(tokens)
    return Residue(value, parse_expression(tokens[place + 1 :]))


def read_numeral(tokens: Tokens) -> Value | None:
    """Digits in a base."""
    if "_" not in tokens or len(tokens) > 80:
        return None
    match = _NUMERAL.fullmatch("".join(tokens).replace('"', ""))
    base = _BASES.get(match[3], int(match[3]) if match[3].isdigit() else 0) if match else 0
    if match is None or not 2 <= base <= 36 or len(match[2]) > 200:
        return None
    try:
        return Numeral(match[2].upper(), base, Fraction(int(match[2], base)))
    except ValueError:  # a digit that the base doesn't have
        return None


def read_scalar(tokens: Tokens) -> Scalar | Unread:
    """An expression with its unit."""
    try:
        measured, unit, is_percent = split_unit(tokens)
        if len(measured) == 1 and (word := number_word(measured[0])) is not None:
            return Scalar(Number(Fraction(word)), unit)
        node = _counted(measured)
    except TooLargeError:
        return Unread(tokens, too_large=True)
    except UnreadableError:
        return Unread(tokens)
    scale = Fraction(1, 100) if is_percent else Fraction(1)
    rounding = _rounding(measured)
    return Scalar(
        multiply(node, Number(scale)) if is_percent else node,
        unit,
        None if rounding is None else rounding * scale,
        tokens,
        is_percent,
    )


def _counted(tokens: Tokens) -> Node:
    """An expression, perhaps with `million` behind it."""
    scale = SCALES.get(tokens[-1].removeprefix('"').lower()) if len(tokens) > 1 else None
    if scale is None:
        return parse_expression(tokens)
    return multiply(parse_expression(tokens[:-1]), Number(Fraction(scale)))


def _rounding(tokens: Tokens) -> Fraction | None:
    """Half of the last digit of a decimal, if it may have been rounded.

    Nothing may be rounded in 142.0, which is how tables write whole numbers, and in a decimal of
    one digit: 0.5 is a half.
    """
    tokens = tokens[1:] if tokens[:1] == ("-",) else tokens
    decimal, power = tokens[:1], tokens[1:]
    if not decimal or not is_number(decimal[0]) or "." not in decimal[0] or "(" in decimal[0]:
        return None
    scale = Fraction(1)
    if power:
        if power[:3] != ("*", "10", "^"):
            return None
        exponent = "".join(power[3:]).strip("{}")
        if not re.fullmatch("-?[0-9]{1,4}", exponent):
            return None
        scale = Fraction(10) ** int(exponent)
    mantissa, _, exponent = decimal[0].lower().partition("e")
    digits = mantissa.partition(".")[2]
    if not digits.strip("0") and not power and not exponent:
        return None
    if len(mantissa.replace(".", "").lstrip("0")) < 2:
        return None
    number(decimal[0])  # of a reasonable size
    return scale * Fraction(10) ** (int(exponent or 0) - len(digits)) / 2
