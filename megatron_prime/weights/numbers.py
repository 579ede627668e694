"""Numbers of the converters' command lines; argparse tells which one is wrong."""

from __future__ import annotations

import argparse
import math


def whole(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not (number := int(text)):
        raise argparse.ArgumentTypeError(f"found {text}, wanted a whole number, 1 or more")
    return number


def gigabytes(text: str) -> int:
    """Bytes of so many GB."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a number of GB above 0")
    return max(int(number * 1e9), 1)
