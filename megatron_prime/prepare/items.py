"""What the preparation handles: a problem on its way into a training file, or the rule it fell to.

Each stage takes items and gives back, for each, the item (perhaps rewritten) or a `Dropped`, which
says by which rule and why. `RULES` is the list of all rules, with where they come from; the report
and docs/data.md print it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prime.data.chat import Message

PAPER = "paper"  # arXiv 2502.01456, appendix on RL data
OURS = "ours"


@dataclass(frozen=True, slots=True)
class Item:
    """A problem, or a conversation, with the place in the input that it comes from."""

    file: str  # the input's name
    number: int  # of the row there, from 0
    place: str  # for people: "numina.jsonl line 3"
    source: str
    ability: str  # "math" or "code"
    messages: tuple[Message, ...]
    text: str  # what duplicates and contamination are judged by
    ground_truth: str  # "" if the row has none
    solution: str | None = None  # a worked solution whose boxed answer must be the ground truth
    reworked: str = ""  # what a rule has changed: "choice_to_open"


@dataclass(frozen=True, slots=True)
class Dropped:
    """An item that is left out."""

    rule: str  # a key of RULES
    why: str
    file: str
    place: str
    source: str
    text: str


def drop(item: Item, rule: str, why: str) -> Dropped:
    """The item, left out by `rule`."""
    assert rule in RULES, f"{rule} is no rule"
    return Dropped(rule, why, item.file, item.place, item.source, item.text)


# name: (what is left out, who says so), in the order in which the rules are tried
RULES = {
    "malformed": ("no JSON object, or fields missing or of the wrong type", OURS),
    "proof": ("asks for a proof (prove, show that)", PAPER),
    "no_gold": ("no ground truth: none given, none boxed, or an empty list of tests", PAPER),
    "tests": ("tests that no program could be run on", OURS),
    "figure": ("needs a figure, diagram or image", PAPER),
    "fill_in": (r"blanks to fill in (\underline{…}; ours: two or more ___)", PAPER),
    "yes_no": ("the answer is yes, no, true or false (only with --drop-yes-no)", OURS),
    "choice": ("multiple choice that no rule makes an open question", PAPER),
    "unmatched": ("the boxed answer of the solution is not the ground truth", PAPER),
    "unchecked": ("the verifier failed or ran out of time on solution and ground truth", OURS),
    "contaminated": ("shares its words with an evaluation problem", OURS),
    "template": ("the chat template can't render it, or would teach more than the answer", OURS),
    "too_long": ("more tokens than the limit", PAPER),
    "duplicate": ("the text has been seen, with the same ground truth", OURS),
    "conflict": ("the text has been seen, with another ground truth", OURS),
    "near_duplicate": ("nearly the text of another, with the same numbers and truth", OURS),
}
