r"""When two answers count as the same vote: their notation apart, not their value.

The verifier compares an answer with the gold one. A vote has no gold, so answers are the same if
their text is, once spaces, dollars, sizes of brackets and other notation are gone: `\dfrac12` and
`\frac{1}{2}` are, 1/2 and 0.5 are not. That splits votes a little, and favours nobody.
"""

from __future__ import annotations

import re

from megatron_prime.verify.math_answer import boxed_answer

_SPACES = r"\\[!,;: ]|\\quad|\\displaystyle|[$~\s]"
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\^\\circ|\^\{\\circ\}|" + _SPACES)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname)\{([^{}]*)\}")
_SHORT_FRAC = re.compile(r"\\frac(\d)(\d)")
_NAMED = re.compile(r"^[A-Za-z]=")
_GROUPED = re.compile(r"^-?\d{1,3}(?:,\d{3})+$")
_WHOLE = re.compile(r"^(-?\d+)\.0*$")


def answer_of(response: str, ability: str) -> str | None:
    """The vote of a response: its normalised boxed answer; None without one, and of programs."""
    boxed = boxed_answer(response) if ability == "math" else None
    return normalized(boxed) or None if boxed else None


def normalized(answer: str) -> str:
    """The answer without what is notation."""
    text = _WORDS.sub(r"\1", answer.strip().rstrip("."))
    text = _DROPPED.sub("", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text).replace(r"\%", "").rstrip("%.")
    text = _NAMED.sub("", text)
    if _GROUPED.match(text):
        text = text.replace(",", "")
    return _WHOLE.sub(r"\1", text)
