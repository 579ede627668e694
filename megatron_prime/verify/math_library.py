r"""What our small language of expressions lacks goes to math-verify: integrals, sums, limits, …

It parses LaTeX with a grammar of ANTLR into SymPy and simplifies. It takes 1/3 and 0.333333 for
equal, so every decimal goes in as the fraction that it is. SymPy reads the digits of a number by
way of `eval`, so the alphabet is small: nothing but digits looks like a number. It knows no limit
of time here: `math_limit.py` owns that.
"""

from __future__ import annotations

import logging
import re

from megatron_prime.verify.math_digits import is_number, number
from megatron_prime.verify.math_notation import Tokens, UnreadableError, tokenize, words

# What is worth its time; garbage is not.
_SENSIBLE = words(
    r"\int \iint \sum \prod \lim \gcd \lcm \max \min \det \bmod \mod \operatorname"
    r" \begin{vmatrix} \partial"
)
_ALPHABET = re.compile(r"[0-9]+|[A-Za-z]|\\[A-Za-z]+|[-+*/^_(){}\[\]|!,=<>&']|\\[{}\\]")
MAX_TOKENS = 200
MAX_EXPONENT = 100


def equivalent(gold: Tokens, answer: Tokens) -> bool:
    """Whether math-verify takes two expressions, of which we could not read one, for equal."""
    if max(len(gold), len(answer)) > MAX_TOKENS or not _SENSIBLE.intersection(gold + answer):
        return False
    if any(_exponent(side) > MAX_EXPONENT or _is_tower(side) for side in (gold, answer)):
        return False  # a power of a sum would be multiplied out, and one of powers written out
    try:
        sides = [_latex(side) for side in (gold, answer)]
    except UnreadableError:
        return False
    from math_verify import LatexExtractionConfig, parse, verify

    # Its own timeouts are off: they would turn the pool's failures into wrong answers. It warns of
    # that, once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # The box or nothing: else it looks inside for a fraction that it can read and forgets the rest.
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    found = [
        parse(rf"\boxed{{{side}}}", [config], extraction_mode="first_match", parsing_timeout=None)
        for side in sides
    ]
    parsed = [[one for one in side if not isinstance(one, str)] for side in found]
    return bool(all(parsed) and verify(*parsed, timeout_seconds=None))


def _exponent(tokens: Tokens) -> int:
    """The largest power of something in round brackets."""
    written = [token for token in tokens if token != "{"]
    powers = (
        power
        for bracket, sign, power in zip(written, written[1:], written[2:], strict=False)
        if (bracket, sign) == (")", "^") and power.isdigit()
    )
    return max((int(power[:9]) for power in powers), default=0)


def _is_tower(tokens: Tokens) -> bool:
    """Whether a number's power has a power: 9^{9^9}."""
    written = "".join(token for token in tokens if token not in "{}")
    return re.search(r"[0-9]\^[0-9]+\^", written) is not None


def warm_up() -> None:
    """Import math-verify and build its grammar, which takes seconds."""
    if not equivalent(tokenize("1"), tokenize(r"\int_0^1 2x\,dx")):
        raise RuntimeError("math-verify doesn't know that the integral of 2x from 0 to 1 is 1")


def _latex(tokens: Tokens) -> str:
    """Tokens as LaTeX again, with fractions for decimals."""
    written = []
    for token in tokens:
        if is_number(token) and not token.isdigit():
            value = number(token)
            written.append(rf"\frac{{{value.numerator}}}{{{value.denominator}}}")
        elif not (_ALPHABET.fullmatch(token) or token.startswith((r"\begin{", r"\end{"))):
            raise UnreadableError(f"found {token!r}, which is left to nobody")
        else:
            written.append(r"\cdot" if token == "*" else token)
    return " ".join(written)
