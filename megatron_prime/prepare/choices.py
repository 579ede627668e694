r"""Multiple choice to open questions, where cutting off the options leaves a question.

`What is 2+3? (A) 4 (B) 5 (C) 6`, answer B, becomes `What is 2+3?`, answer 5: guessing a letter
would be right one time in three. It works only if the question doesn't speak of its options (the
paper's "following" and "statement", and words that ask for one of several), if the letter is among
them, and if its option is a number or a formula that a verifier can compare. All others are
dropped; the paper has a language model rewrite some of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_prime.data.chat import Message
from megatron_prime.prepare.items import Dropped, Item, drop
from megatron_prime.verify.math_answer import boxed_answer

_FONT = r"\\(?:text(?:bf|rm|it)?|math(?:bf|rm|it))"
# Three ways to write the mark of an option; the letter is the only group.
_STYLES = [
    re.compile(rf"\$?\(?{_FONT}\s*\{{\s*\(?([A-J])\s*\)?\.?\s*\}}\s*[):.]?"),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?:(?<=\s)|^)([A-J])\s?[.):．：、]\s?(?=\S)"),
]
_SPEAKS_OF_OPTIONS = re.compile(
    r"\bfollowing\b|\bstatements?\b|\boptions?\b|\bchoices?\b|\bchoose\b|\bwhich\b|\bclosest\b"
    r"|\bbest (?:approximat|estimat|describ)|\b(?:could|may|might|cannot|can not|must) be\b"
    r"|\bexcept\b|\bcan be\b|\bpossible value\b|\bone of\b|\bapproximately\b|\bnearest\b"
    r"|\btrue\b|\bcorrect\b",
    re.IGNORECASE,
)
_EDGES = re.compile(
    r"^(?:\s|\\[ ,;:!]|\\qquad|\\quad|~|\$|:)+|(?:\s|\\[ ,;:!\\]|\\qquad|\\quad|~|\$|\.|;|,|&)+$"
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(
    rf"\(?\s*(?:{_FONT}\s*\{{)?\s*\(?\s*([A-J])\s*\)?\.?\s*\}}?\s*\)?\s*(?:$|[.:]|(?<=[)}}])\s*\S)"
)
_ASKED_LENGTH = 12  # characters; a stem of fewer asks nothing
_BARE_LETTER = re.compile(r"[A-J]")


def open_question(item: Item) -> Item | Dropped:
    """The item as it is if it has no options, as an open question if a rule can, else dropped."""
    options = find_options(item.text)
    letter = _letter(item.ground_truth)
    if options is None:
        if _names_other_mark(item):
            return drop(
                item, "choice", f"the answer {item.ground_truth!r} is the mark of an option"
            )
        if letter is not None and re.fullmatch(r"\(?[A-E]\)?", _bare(item.ground_truth)):
            return drop(item, "choice", f"the answer is the letter {letter} of no options")
        return item
    stem, values = options
    chosen = _chosen(letter, item.ground_truth, values)
    if chosen is None:
        return drop(item, "choice", f"found the answer {item.ground_truth!r} in none of {values}")
    if found := _SPEAKS_OF_OPTIONS.search(stem):
        return drop(item, "choice", f"the question says {found.group()!r}")
    value = values[chosen]
    if len(stem) < _ASKED_LENGTH or stem.count(r"\[") != stem.count(r"\]"):
        return drop(item, "choice", "too little is left without the options")
    if len(set(values)) < len(values) or not is_formula(value):
        return drop(item, "choice", f"the option {value!r} is no number or formula")
    solution = item.solution
    boxed = _letter(boxed_answer(solution) or "") if solution else None
    if boxed is not None:
        if ord(boxed) - ord("A") != chosen:
            return drop(item, "unmatched", f"the solution boxes {boxed}, not option {chosen + 1}")
        solution = None  # its letter has been compared
    messages = _with_text(item, stem)
    if messages is None:
        return drop(item, "choice", "the question is not one piece of one message")
    return replace(
        item,
        messages=messages,
        text=stem,
        ground_truth=value,
        solution=solution,
        reworked="choice_to_open",
    )


def _names_other_mark(item: Item) -> bool:
    """Whether the answer is one of (a) (b) (c) or ① ② ③, and the question has these marks."""
    answer = _bare(item.ground_truth).strip("()")
    for marks, style in (("abcdefgh", "({})"), ("abcdefgh", "{})"), ("①②③④⑤⑥⑦⑧", "{}")):
        if answer and answer in marks and all(style.format(m) in item.text for m in marks[:3]):
            return True
    return False


def find_options(text: str) -> tuple[str, list[str]] | None:
    """The question before its last run of options A, B, C, …, and the options; None without."""
    for style in _STYLES:
        marks = list(style.finditer(text))
        for first in reversed(range(len(marks))):
            run = marks[first:]
            letters = "".join(mark.group(1) for mark in run)
            if len(run) >= 3 and "ABCDEFGHIJ".startswith(letters):
                ends = [*(mark.start() for mark in run[1:]), len(text)]
                values = [
                    _bare(text[mark.end() : end]) for mark, end in zip(run, ends, strict=True)
                ]
                return _stem(text[: run[0].start()]), values
    return None


def is_formula(value: str) -> bool:
    """Whether a verifier can compare it: no words beside LaTeX commands, braces that close."""
    letters = _COMMAND.sub(" ", value)
    return (
        bool(value)
        and len(value) <= 100
        and value.count("{") == value.count("}")
        and r"\text" not in value
        and not re.search(r"[^\W\d_]{3,}", letters)
        and bool(re.search(r"\d|[A-Za-z]", value))
        and "\n" not in value
    )


def _with_text(item: Item, text: str) -> tuple[Message, ...] | None:
    """The messages with another question; None unless it stands in exactly one place."""
    if sum(message.content.count(item.text) for message in item.messages) != 1:
        return None
    return tuple(replace(m, content=m.content.replace(item.text, text)) for m in item.messages)


def _chosen(letter: str | None, answer: str, values: Sequence[str]) -> int | None:
    """Which option the answer names, by letter or by value."""
    if letter is not None and ord(letter) - ord("A") < len(values):
        return ord(letter) - ord("A")
    same = [i for i, value in enumerate(values) if value.replace(" ", "") == _tight(answer)]
    return same[0] if len(same) == 1 else None


def _letter(answer: str) -> str | None:
    r"""`B` of `B`, `(B)`, `\textbf{(B)}`, `(B) 15`, `B. 15`; None of others."""
    found = _LETTER.match(_bare(answer))
    return found.group(1) if found else None


def _bare(value: str) -> str:
    """Without what stands between options: spaces, dollar signs, full stops, row ends."""
    before = None
    while before != value:
        before, value = value, _EDGES.sub("", value)
    return value.replace("$", "")


def _tight(value: str) -> str:
    return _bare(value).replace(" ", "")


def _stem(text: str) -> str:
    """The question, without a dollar sign or a display that only the options would have closed."""
    text = text.rstrip()
    if text.count("$") % 2:
        head, _, tail = text.rpartition("$")
        text = head + tail
    return re.sub(r"(?:\\\[|\\\(|\\qquad|\\quad|\\\\|\s)+$", "", text)
