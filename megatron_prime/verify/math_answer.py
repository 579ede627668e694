r"""Is the boxed answer the right one? 1.0 or 0.0, nothing between.

The answer is what stands in the last `\boxed{…}` of the response; of `\fbox{…}` only where there is
no `\boxed`, as in the paper's code. Equal strings and plain numbers are settled at once. Everything
else is read into typed values, which are compared as a mathematician would (docs/verifiers.md has
the conventions):

    math_notation     characters → tokens: spaces, fonts, thousands separators are gone
    math_read         tokens → typed values: lists, intervals, matrices, quantities, expressions
    math_compare      two values → equal or not
    math_numbers      two expressions → equal or not, exactly or by numbers of many digits
    math_library      what we can't read ourselves → math-verify

No text is ever evaluated as code. Lengths, depths and sizes of numbers are bounded before any work;
what is left to a library may still hang, so a worker process puts `math_limit.py` around it.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_prime.verify.math_compare import equal
from megatron_prime.verify.math_limit import cpu_limit
from megatron_prime.verify.math_notation import Tokens, UnreadableError, tokenize
from megatron_prime.verify.math_read import read
from megatron_prime.verify.math_types import Value

MAX_ANSWER_LENGTH = 1000  # characters; no answer of the data comes near it

# An opening box, then whatever else could be mistaken for a brace: a line break, an escaped brace.
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed|fbox)|\\[{}]|(?P<brace>[{}])")
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_GROUPED = re.compile(r"\d,\d{3}")


def grade(response: str, ground_truth: str) -> float:
    r"""1.0 if the last balanced `\boxed{…}` of `response` holds `ground_truth`, else 0.0.

    No box, an empty one and one of more than MAX_ANSWER_LENGTH characters score 0. Two plain
    integers are compared as integers, so that 1,000 is 1000 and nothing is rounded.
    """
    answer = boxed_answer(response)
    truth = ground_truth.strip()
    if not answer or not truth or max(len(answer), len(truth)) > MAX_ANSWER_LENGTH:
        return 0.0
    if answer == truth:
        return 1.0
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(truth):
        return float(_integer(answer) == _integer(truth))
    return float(_equivalent(truth, answer))


def grade_in_time(response: str, ground_truth: str) -> float:
    """`grade` with a limit on CPU time; for the main thread of a worker process."""
    with cpu_limit():
        return grade(response, ground_truth)


def boxed_answer(response: str) -> str | None:
    r"""The content, stripped, of the balanced `\boxed{…}` that opens last; None if there is none.

    Without any, that of `\fbox{…}`. One pass, for a response may be nothing but opening boxes.
    """
    opened: list[tuple[int, str] | None] = []  # begin and kind of each open box; None for a brace
    found: dict[str, tuple[int, int]] = {}
    for token in _BRACES.finditer(response):
        if token["box"]:
            opened.append((token.end(), "fbox" if "f" in token["box"] else "boxed"))
        elif token["brace"] == "{":
            opened.append(None)
        elif token["brace"] == "}" and opened:
            box = opened.pop()
            if box is not None and box[0] > found.get(box[1], (-1, -1))[0]:
                found[box[1]] = box[0], token.start()
    begin, end = found.get("boxed") or found.get("fbox") or (-1, -1)
    return None if begin < 0 else response[begin:end].strip()


def _integer(text: str) -> int:
    return int(text.replace(",", ""))


def _equivalent(truth: str, answer: str) -> bool:
    try:
        gold_tokens, gold = _gold(truth)
    except UnreadableError:
        return False
    for thousands in (True, False) if _GROUPED.search(answer) else (True,):
        try:
            if tokenize(answer, thousands) == gold_tokens and gold_tokens:
                return True
            if gold is not None and equal(gold, read(answer, thousands)):
                return True
        except UnreadableError:
            continue
    return False


@lru_cache(maxsize=1024)
def _gold(truth: str) -> tuple[Tokens, Value | None]:
    """A gold answer's tokens and value, made once for the answers of its group."""
    tokens = tokenize(truth)
    try:
        return tokens, read(truth)
    except UnreadableError:
        return tokens, None
