"""Reading published data sets: one parser per format, found by the fields of a file's first row.

    eurus    data_source, prompt, ability, reward_model             Eurus-2-RL-Data
    numina   problem, solution and/or answer, source                NuminaMath-CoT, -1.5, MATH
    code     question, input_output, starter_code, fn_name          APPS, TACO
    chat     messages (or conversations with from and value)        conversations for SFT

A parser raises RowError for a row that isn't what the format says. An empty ground truth is no such
error: published sets have thousands of them, so that a rule drops and counts them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_prime.data.chat import SUFFIXES, Message, parse_messages
from megatron_prime.data.rows import DataError, Row, RowError, field, one_of, scan_rows
from megatron_prime.prepare.items import Item
from megatron_prime.verify.math_answer import boxed_answer

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPEAKERS["system"] = "system"
_LOOK_AHEAD = 20  # rows that may be broken before the format of a file must be clear

Parser = Callable[[Row, str], dict[str, Any]]


def detect(path: Path, formats: dict[str, Parser]) -> str:
    """Which of `formats` the first readable row of `path` has; DataError if none."""
    found: list[str] = []
    for _, _, row in islice(scan_rows(path), _LOOK_AHEAD):
        if isinstance(row, RowError):
            continue
        found = sorted(row)
        for name, marks in MARKS.items():
            if name in formats and any(mark <= row.keys() for mark in marks):
                return name
        break
    wanted = "; ".join(
        f"{name}: {' or '.join('+'.join(sorted(mark)) for mark in MARKS[name])}" for name in formats
    )
    raise DataError(
        f"{path}: found the fields {found}, wanted those of a known format ({wanted});"
        " name it with --format, or rename the fields"
    )


def items(path: Path, parser: Parser) -> Iterator[tuple[int, str, Item | RowError]]:
    """Number, place and item of each row, or what is wrong with it."""
    for number, label, row in scan_rows(path):
        place = f"{path.name} {label}"
        try:
            if isinstance(row, RowError):
                raise row
            item = Item(path.name, number, place, **parser(row, path.stem))
            _check_text(item)
            yield number, place, item
        except RowError as error:  # the caller counts it or gathers it
            yield number, place, error


def eurus(row: Row, stem: str) -> dict[str, Any]:
    """A row of Eurus-2-RL-Data; its text is what the user says, without the paper's suffix."""
    messages = parse_messages(row, "prompt")
    if messages[-1].role != "user":
        raise RowError(f"prompt: found {messages[-1].role!r} as the last role, wanted 'user'")
    ability = one_of(row, "ability", tuple(SUFFIXES))
    reward_model = field(row, "reward_model", dict)
    try:
        one_of(reward_model, "style", ("rule",))
    except RowError as error:
        raise RowError(f"reward_model.{error}") from error
    suffix = SUFFIXES[ability].strip()
    asked = [m.content.strip().removesuffix(suffix) for m in messages if m.role == "user"]
    return {
        "source": field(row, "data_source", str),
        "ability": ability,
        "messages": tuple(messages),
        "text": "\n".join(asked).strip(),
        "ground_truth": _text(reward_model, "ground_truth"),
    }


def numina(row: Row, stem: str) -> dict[str, Any]:
    """A problem with a worked solution, an answer or both."""
    problem, solution = field(row, "problem", str), _text(row, "solution")
    answer = _text(row, "answer")
    if "solution" not in row and "answer" not in row:
        raise RowError("solution: found neither it nor an answer, wanted one of them")
    named = _text(row, "source")
    return {
        "source": f"numina_{named}" if named else stem,
        "ability": "math",
        "messages": (Message("user", problem.strip()),),
        "text": problem.strip(),
        "ground_truth": answer or boxed_answer(solution) or "",
        "solution": solution or None,
    }


def code(row: Row, stem: str) -> dict[str, Any]:
    """A programming problem; its tests become the JSON of Eurus-2-RL-Data."""
    question, starter = field(row, "question", str).strip(), _text(row, "starter_code")
    tests = row.get("input_output")
    name = _text(row, "fn_name")
    if isinstance(tests, str) and tests.strip():
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise RowError(f"input_output: found no JSON ({error}), wanted an object") from error
    if tests and not isinstance(tests, dict):
        raise RowError(f"input_output: found a {type(tests).__name__}, wanted an object")
    if tests and name:
        tests = {**tests, "fn_name": name}
    if tests:
        name = _text(tests, "fn_name")
    text = question
    if starter:
        text += f"\n\nStart from this code:\n```python\n{starter}\n```"
    elif name and name not in question:
        text += f"\n\nName the function `{name}`."
    return {
        "source": _text(row, "source") or stem,
        "ability": "code",
        "messages": (Message("user", text),),
        "text": question,
        "ground_truth": json.dumps(tests, ensure_ascii=False) if tests else "",
    }


def chat(row: Row, stem: str) -> dict[str, Any]:
    """A conversation that ends with the assistant."""
    if "messages" not in row and "conversations" in row:
        turns = field(row, "conversations", list)
        row = {**row, "messages": [_turn(turn, i) for i, turn in enumerate(turns)]}
    return _conversation(row, parse_messages(row, "messages"), stem)


def solved(row: Row, stem: str) -> dict[str, Any]:
    """A problem and its worked solution as a conversation."""
    solution = field(row, "solution", str).strip()
    problem = Message("user", field(row, "problem", str).strip())
    parsed = _conversation(row, [problem, Message("assistant", solution)], stem)
    return {**parsed, "ground_truth": _text(row, "answer"), "solution": solution}


def _conversation(row: Row, messages: list[Message], stem: str) -> dict[str, Any]:
    roles = [message.role for message in messages]
    if roles[-1] != "assistant" or roles[0] == "assistant":
        raise RowError(f"messages: found the roles {roles}, wanted the assistant's last, not first")
    return {
        "source": _text(row, "source") or _text(row, "data_source") or stem,
        "ability": "code" if row.get("ability") == "code" else "math",
        "messages": tuple(messages),
        "text": "\n".join(m.content for m in messages if m.role != "system"),
        "ground_truth": "",
    }


def _check_text(item: Item) -> None:
    """RowError for half of a character, which JSON can hold and no tokenizer takes."""
    for text in (item.source, item.ground_truth, *(m.content for m in item.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise RowError(f"found half a character, {half!r}, wanted whole Unicode") from error


def _turn(turn: Any, position: int) -> Row:
    if not isinstance(turn, dict) or turn.get("from") not in _SPEAKERS:
        raise RowError(
            f"conversations[{position}]: found {turn!r:.80}, wanted from ({', '.join(_SPEAKERS)})"
            " and value"
        )
    return {"role": _SPEAKERS[turn["from"]], "content": turn.get("value")}


def _text(row: Row, name: str) -> str:
    """A text that may be missing or null; a number is its text."""
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    raise RowError(f"{name}: found {value!r:.80}, wanted a text")


MARKS: dict[str, tuple[set[str], ...]] = {
    "eurus": ({"prompt", "reward_model"},),
    "numina": ({"problem", "solution"}, {"problem", "answer"}),
    "code": ({"question", "input_output"},),
    "chat": ({"messages"}, {"conversations"}),
    "solved": ({"problem", "solution"},),
}
RL_FORMATS: dict[str, Parser] = {"eurus": eurus, "numina": numina, "code": code}
SFT_FORMATS: dict[str, Parser] = {"chat": chat, "solved": solved}
