r"""Answers in words: names, yes and no, `no solution`, `all real numbers`, numbers up to twelve."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_prime.verify.math_notation import Tokens
from megatron_prime.verify.math_sets import LINE
from megatron_prime.verify.math_tree import Number, Symbol
from megatron_prime.verify.math_types import Finite, Line, Scalar, Text, Value

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_NOTHING = re.compile(
    r"no (?:real |such |integer )?(?:solutions?|roots?|values?|numbers?|answers?)(?: exists?)?"
    r"|none|(?:the )?(?:empty|null) set"
)
_EVERYTHING = re.compile(r"all (?:the )?reals?(?: numbers?)?|(?:the )?reals|(?:the )?real numbers")
_UNDEFINED = re.compile(r"undefined|dne|does not exist|not defined|not exist")


def read_words(tokens: Tokens) -> Value | None:
    """The value of an answer that consists of words; None if it doesn't."""
    if not all(token[0] == '"' or token in ("-", ".", "'") for token in tokens):
        return None
    if any(token in ('"and', '"or') for token in tokens):
        return None
    text = plain(" ".join(token.removeprefix('"') for token in tokens))
    if len(text) == 1 or not text:
        return None  # a letter in another font
    if _NOTHING.fullmatch(text):
        return Finite(())
    if _EVERYTHING.fullmatch(text):
        return Line(LINE)
    if text in NUMBERS:
        return Scalar(Number(Fraction(NUMBERS.index(text))))
    if text in ("infinity", "positive infinity"):
        return Scalar(Symbol(r"\infty"))
    return Text("undefined" if _UNDEFINED.fullmatch(text) else text)


def number_word(token: str) -> int | None:
    """The number that a word says."""
    word = token.removeprefix('"').lower()
    return NUMBERS.index(word) if token[0] == '"' and word in NUMBERS else None


def plain(text: str) -> str:
    """Without case, punctuation and article."""
    text = re.sub(r"[^\w\s]|_", " ", text.casefold().replace("'", ""))
    return re.sub(r"^(?:an?|the) (?=\w)", "", " ".join(text.split()))
