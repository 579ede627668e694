r"""What an item must be to be verifiable, one rule after the other; no model is asked.

For mathematics the rules of the paper's appendix (arXiv 2502.01456): no proofs, no figures, nothing
to fill in, no multiple choice, an answer that the solution really boxes. Where the paper asks a
language model (is this choice question open once its options are gone? which solution is right?),
`choices.py` has a rule that keeps fewer. For programs the tests must be of a form that can be run.
"""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_prime.prepare.choices import open_question
from megatron_prime.prepare.items import Dropped, Item, drop
from megatron_prime.prepare.text import shorten
from megatron_prime.verify.math_answer import MAX_ANSWER_LENGTH

_PROOF = re.compile(r"\bprov(?:e|ing)\b|\bshow that\b", re.IGNORECASE)
_FIGURE = re.compile(
    r"(?<!significant )(?<!-)\bfigures?\b|\bdiagrams?\b|\bpictured\b|\bshown (?:below|above|here)\b"
    r"|\b(?:picture|image|graph|drawing) (?:shown|below|above|at (?:the )?(?:left|right))\b"
    r"|\bin the (?:picture|image|drawing)\b"
    r"|\\includegraphics|!\[|<image>|\[image\]|\[asy\]|cdn\.mathpix\.com",
    re.IGNORECASE,
)
_IMAGE = re.compile(r"\\includegraphics|!\[|<image>|\[image\]|<img\b", re.IGNORECASE)
_BLANK = re.compile(r"(?:\\?_[\s]?){3,}")
_YES_NO = frozenset({"yes", "no", "true", "false"})
_NO_ANSWER = frozenset({"proof", "notfound", "none", "null", "n/a", "see solution"})
_SAYS_SOMETHING = re.compile(r"[^\W_]|\\\{|∅")
_FONTS = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)\s*\{([^{}]*)\}")


def screen(item: Item, drop_yes_no: bool) -> Item | Dropped:
    """The item, a choice question perhaps turned into an open one, or the rule it falls to."""
    return _code(item) if item.ability == "code" else _math(item, drop_yes_no)


def _math(item: Item, drop_yes_no: bool) -> Item | Dropped:
    answer = _plain_words(item.ground_truth)
    if answer == "proof" or (found := _PROOF.search(item.text)):
        return drop(item, "proof", "the answer is “proof”" if answer == "proof" else _says(found))
    if not _SAYS_SOMETHING.search(answer) or answer in _NO_ANSWER:
        return drop(item, "no_gold", f"found the answer {item.ground_truth!r}")
    if len(item.ground_truth) > MAX_ANSWER_LENGTH:
        return drop(
            item, "no_gold", f"an answer of {len(item.ground_truth)} characters, never right"
        )
    if found := _FIGURE.search(item.text):
        return drop(item, "figure", _says(found))
    if r"\underline{" in item.text:
        return drop(item, "fill_in", r"says \underline{")
    if len(_BLANK.findall(item.text)) > 1:
        return drop(item, "fill_in", f"has {len(_BLANK.findall(item.text))} blanks")
    if drop_yes_no and answer in _YES_NO:
        return drop(item, "yes_no", f"found the answer {answer!r}")
    return open_question(item)


def _code(item: Item) -> Item | Dropped:
    if not item.ground_truth:
        return drop(item, "no_gold", "found no tests")
    try:
        tests = json.loads(item.ground_truth)
        if not isinstance(tests, dict):
            raise ValueError(f"found a {type(tests).__name__}, wanted an object")
    except ValueError as error:  # counted like any other reason
        return drop(item, "tests", f"found no JSON object ({error})")
    if not tests.get("inputs") and not tests.get("outputs"):
        return drop(item, "no_gold", "found no tests")
    if why := _unusable(tests):
        return drop(item, "tests", why)
    found = _IMAGE.search(item.text)
    return drop(item, "figure", _says(found)) if found else item


def _unusable(tests: dict[str, Any]) -> str:
    """Why no program can be run on `tests`; "" if it can."""
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        return "found no lists of inputs and outputs"
    if len(inputs) != len(outputs):
        return f"found {len(inputs)} inputs and {len(outputs)} outputs"
    name = tests.get("fn_name")
    if name is None:
        bad = next((v for v in (*inputs, *outputs) if not _is_text(v)), None)
        return "" if bad is None else f"found {shorten(repr(bad), 40)} for stdin or stdout"
    if not isinstance(name, str) or not name.strip():
        return f"found the function name {name!r}"
    call = next((v for v in inputs if not isinstance(v, list)), None)
    return "" if call is None else f"found {shorten(repr(call), 40)}, wanted a list of arguments"


def _is_text(value: Any) -> bool:
    """A text, or its lines, as some sets have it."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(line, str) for line in value)
    )


def _plain_words(answer: str) -> str:
    """`\\text{ Yes.}` as `yes`."""
    return _FONTS.sub(r"\1", answer).strip(" .$\n").casefold()


def _says(found: re.Match[str] | None) -> str:
    assert found is not None, "a rule that fired has found something"
    return f"says {found.group()!r}"
