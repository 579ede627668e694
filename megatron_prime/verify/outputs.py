"""Is what a program says what was expected? Printed text by tokens, returned values as data.

Text is split at white space; the tokens must agree in number and order, each either character by
character or as a number: to the released code's tolerance (NumPy's `allclose`) where a decimal
fraction was expected, and to ABSOLUTE where an integer was but a fraction came (a 3.0 for a 3).
Two integers must be equal. Unlike the released code, nothing here compares as a set, and 1000000007
is not 1000000008.
"""

from __future__ import annotations

import json
import re
from decimal import Context, Decimal
from typing import Any

RELATIVE, ABSOLUTE = 1e-5, 1e-8  # NumPy's, around the expected value
WHOLE = 1e-6  # how far from an expected integer a fraction may be
MAX_DIGITS = 4000  # of an integer that Python reads without complaint

_INTEGER = re.compile(r"[+-]?[0-9]+")
# Without two ways to read the same digits, which would cost the square of their number.
_FRACTION = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_EXACT = Context(prec=1000)  # more digits than a float's largest number has


def same_text(found: str, expected: str) -> bool:
    """Whether `found` has the tokens of `expected`, in its order."""
    ours, theirs = found.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_token, ours, theirs))


def same_value(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal: lists and objects by their parts, numbers by value.

    A number is no string. As in Python, 3.0 is 3 and true is 1; an expected fraction has the
    tolerance of printed ones.
    """
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(map(same_value, found, expected))
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(same_value(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, float) and isinstance(found, int | float):
        return found == expected or (abs(found) < 1e300 and _close(float(found), expected))
    return bool(found == expected)


def read_value(text: bytes | str) -> Any:
    """A JSON value, integers of any length included; ValueError if it is none or too deep."""
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _same_token(found: str, expected: str) -> bool:
    if found == expected:
        return True
    if _INTEGER.fullmatch(expected):
        if _INTEGER.fullmatch(found):
            return _canonical(found) == _canonical(expected)
        return bool(_FRACTION.fullmatch(found)) and _near_integer(found, expected)
    return bool(_FRACTION.fullmatch(expected) and _FRACTION.fullmatch(found)) and _close(
        float(found), float(expected)
    )


def _near_integer(found: str, expected: str) -> bool:
    """To WHOLE, also where two floats are further apart than that: 1e18 is not 10**18 + 7."""
    if not abs(float(found) - float(expected)) <= WHOLE:  # nor where both are infinite
        return False
    return abs(_EXACT.subtract(Decimal(found), Decimal(expected))) <= Decimal(WHOLE)


def _close(found: float, expected: float) -> bool:
    return abs(found - expected) <= ABSOLUTE + RELATIVE * abs(expected)


def _canonical(integer: str) -> str:
    """Without plus and leading zeros; the integer may be too long to be worth computing."""
    digits = integer.lstrip("+-").lstrip("0") or "0"
    return "-" + digits if integer[0] == "-" and digits != "0" else digits


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= MAX_DIGITS else Decimal(digits)
