"""Is the boxed answer the right one? 1.0 or 0.0, nothing between.

The answer is what stands in the last `\\boxed{…}` of the response. Equal strings and integers are
settled at once; the rest goes to math-verify, which parses both sides into SymPy and compares them.
It may run for ever on towers of powers and it knows no limit of its own here: `pool.py` owns the
time, and kills.
"""

from __future__ import annotations

import logging
import re

MAX_ANSWER_LENGTH = 1000  # characters; no answer of the data comes near it

# An opening box, then whatever else could be mistaken for a brace: a line break, an escaped brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<brace>[{}])")
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")


def grade(response: str, ground_truth: str) -> float:
    r"""1.0 if the last balanced `\boxed{…}` of `response` holds `ground_truth`, else 0.0.

    No box, an empty one and one of more than MAX_ANSWER_LENGTH characters score 0. Two plain
    integers are compared as integers, so that 1,000 is 1000 and nothing is rounded.
    """
    answer = boxed_answer(response)
    truth = ground_truth.strip()
    if not answer or len(answer) > MAX_ANSWER_LENGTH:
        return 0.0
    if answer == truth:
        return 1.0
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(truth):
        return float(_integer(answer) == _integer(truth))
    return float(_equivalent(answer, truth))


def boxed_answer(response: str) -> str | None:
    r"""The content, stripped, of the balanced `\boxed{…}` that opens last; None if there is none.

    One pass, for a response may consist of nothing but opening boxes.
    """
    opened: list[int | None] = []  # where the content of each open box begins; None for a brace
    begin, end = -1, -1
    for token in _BRACES.finditer(response):
        if token["box"]:
            opened.append(token.end())
        elif token["brace"] == "{":
            opened.append(None)
        elif token["brace"] == "}" and opened:
            start = opened.pop()
            if start is not None and start > begin:
                begin, end = start, token.start()
    return None if begin < 0 else response[begin:end].strip()


def _integer(text: str) -> int:
    return int(text.replace(",", ""))


def _equivalent(answer: str, truth: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # Its own timeouts are off: they would turn the pool's failures into wrong answers. It warns of
    # that, once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold, found = (
        parse(rf"\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
        for text in (truth, answer)
    )
    return bool(verify(gold, found, timeout_seconds=None))
