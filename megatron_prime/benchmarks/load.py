r"""Benchmark files into prompts; no problem is ever left out silently.

A row is one of three forms:

    {"problem" | "question": text, "answer" | "final_answer": gold, "id": …}       mathematics;
    {"problem": text, "tests": {"inputs": […], "outputs": […]}, "id": …}           programs, shown
                                                             with "starter_code" if there is one;
    the fields of Eurus-2-RL-Data (`data/prompts.py`).

Minerva Math has no gold but the last `\boxed{…}` of its `solution`. A problem that is too long, or
that nobody can check, is an error: an accuracy over fewer problems would be another benchmark's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_prime.data.chat import (
    Message,
    Template,
    Tokenizer,
    build_messages,
    check_tokenizer,
    encode_prompt,
)
from megatron_prime.data.prompts import parse_prompt
from megatron_prime.data.rows import DataError, Row, RowError, field, read_rows
from megatron_prime.known_sets import KNOWN_SETS, KnownSet, how_to_bring
from megatron_prime.types import EvalSet, Prompt
from megatron_prime.verify.math_answer import boxed_answer
from megatron_prime.verify.worker import SUPPORTED_ABILITIES

_IDS = ("id", "unique_id", "task_id", "question_id", "idx")
_ANY = KnownSet("", "", 0, 0, "", "")


def load_set(
    name: str,
    path: Path,
    tokenizer: Tokenizer,
    template: Template,
    max_prompt_length: int,
    max_tokens: int,
    max_prompts: int = 0,
) -> EvalSet:
    """The first `max_prompts` problems of a file (0: all); `prompt_id` is the row's number, from 0.

    Raises DataError, with the form that is wanted, for rows of another, for problems of more than
    `max_prompt_length` tokens, without a verifier, of the same id, or of
    two abilities.
    """
    check_tokenizer(tokenizer)
    known = KNOWN_SETS.get(name, _ANY)

    def parse(number: int, row: Row) -> tuple[str, Prompt] | None:
        return _problem(number, row, name, tokenizer, template) if _counts(row, known) else None

    try:
        rows = [found for found in read_rows(path, parse) if found is not None]
    except DataError as error:
        raise DataError(f"{error}\nevaluate.sets.{name}: {how_to_bring(name)}") from error
    rows = rows[: max_prompts or None]
    ids, prompts = tuple(id_ for id_, _ in rows), tuple(prompt for _, prompt in rows)
    problem = _unfit(known, ids, prompts, max_prompt_length)
    if problem:
        raise DataError(f"{path}: {problem}\nevaluate.sets.{name}: {how_to_bring(name)}")
    return EvalSet(name, prompts, ids, max_tokens)


def _unfit(
    known: KnownSet, ids: tuple[str, ...], prompts: tuple[Prompt, ...], max_prompt_length: int
) -> str:
    """Why these can't be evaluated on; nothing if they can."""
    if not ids:
        return (
            f"found no row of {known.title} (url with {known.only_url!r}, contest_date from "
            f"{known.since} to {known.until})"
        )
    if double := [id_ for id_, count in Counter(ids).items() if count > 1]:
        return f"found the id {double[0]!r} more than once; wanted one for each problem"
    unchecked = Counter(p.ability for p in prompts if p.ability not in SUPPORTED_ABILITIES)
    if unchecked:
        return (
            f"found {dict(unchecked)} problems without a verifier, wanted only "
            f"{', '.join(SUPPORTED_ABILITIES)}; leave the set out of evaluate.sets"
        )
    if other := {p.ability for p in prompts} - {known.ability or p.ability for p in prompts}:
        return f"found problems of ability {sorted(other)}, wanted {known.ability!r}"
    abilities = Counter(prompt.ability for prompt in prompts)
    if len(abilities) > 1:  # votes exist of mathematics alone
        return (
            f"found {dict(abilities)} problems in one set, wanted one ability, for maj@k is of "
            "mathematics alone; split the file into a set for each"
        )
    lengths = [len(prompt.token_ids) for prompt in prompts]
    if max(lengths) > max_prompt_length:
        longer = sum(length > max_prompt_length for length in lengths)
        return (
            f"found {longer} prompts of up to {max(lengths)} tokens, wanted at most "
            f"{max_prompt_length}; an evaluation leaves none out: raise data.max_prompt_length"
        )
    return ""


def _counts(row: Row, known: KnownSet) -> bool:
    """Whether a row is the set's; files may hold more years than one."""
    if known.only_url and "url" in row:
        return known.only_url in str(row["url"])
    if known.since and "contest_date" in row:
        return known.since <= str(row["contest_date"])[:10] <= known.until
    return True


def _problem(
    number: int, row: Row, name: str, tokenizer: Tokenizer, template: Template
) -> tuple[str, Prompt]:
    id_ = next((str(row[key]) for key in _IDS if row.get(key) is not None), str(number))
    if "reward_model" in row:
        return id_, parse_prompt(number, row, tokenizer, template)
    text = field(row, "problem" if "problem" in row else "question", str)
    if "tests" in row:
        ability, gold = "code", _tests(row["tests"])
        text += _starter(row)
    else:
        ability, gold = "math", _gold(row)
        if name in KNOWN_SETS and KNOWN_SETS[name].integers:
            gold = re.sub(r"\.0+$", "", gold)
    messages = build_messages([Message("user", text)], ability, template)
    return id_, Prompt(number, encode_prompt(tokenizer, messages), gold, ability, name)


def _starter(row: Row) -> str:
    """The code to begin with, in the training data's words (`prepare/sources.py`): the tests call
    a function by the name it has there."""
    code = row.get("starter_code") or ""
    if not isinstance(code, str):
        raise RowError(f"starter_code: found a {type(code).__name__}, wanted text")
    return f"\n\nStart from this code:\n```python\n{code.strip()}\n```" if code.strip() else ""


def _gold(row: Row) -> str:
    """The right answer, without dollars around it; of several, all with commas between."""
    found: Any = row.get("answer", row.get("final_answer"))
    if found is None and isinstance(row.get("solution"), str):
        found = boxed_answer(row["solution"])
    parts = found if isinstance(found, list) else [found]
    golds = [str(part).strip().strip("$").strip() for part in parts if _is_gold(part)]
    if not golds or len(golds) < len(parts) or not all(golds):
        raise RowError(
            f"found {found!r} as answer, wanted text, a number or a list of them in `answer` or "
            r"`final_answer`, or a \boxed{…} in `solution`"
        )
    return ", ".join(golds)


def _is_gold(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _tests(found: object) -> str:
    """The tests as the JSON of Eurus-2-RL-Data."""
    try:
        tests = json.loads(found) if isinstance(found, str) else found
    except ValueError as error:
        raise RowError(f"tests: found no JSON ({error})") from error
    sides = [tests.get(side) for side in ("inputs", "outputs")] if isinstance(tests, dict) else []
    lists = [side for side in sides if isinstance(side, list) and side]
    if len(lists) < 2 or len(lists[0]) != len(lists[1]):
        raise RowError(
            'tests: wanted {"inputs": [...], "outputs": [...]} of the same length, at least one'
        )
    return json.dumps(tests)
