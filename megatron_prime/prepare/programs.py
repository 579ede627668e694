"""Small programming problems: a line of integers through a few operations, and what to print.

Each operation is a sentence, a function and a line of Python. The tests come from the functions;
the worked program consists of the lines, of which a sloppy writer leaves some out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
_TESTS = 8
_LONGEST = 10  # integers on a line


@dataclass(frozen=True, slots=True)
class _Step:
    """`{k}` in the texts is a number from 2 to 9."""

    sentence: str
    apply: Callable[[list[int], int], list[int]]
    line: str


_STEPS = (
    _Step(
        "keep only the multiples of {k}",
        lambda values, k: [v for v in values if v % k == 0],
        "values = [v for v in values if v % {k} == 0]",
    ),
    _Step(
        "remove all numbers greater than {k}",
        lambda values, k: [v for v in values if v <= k],
        "values = [v for v in values if v <= {k}]",
    ),
    _Step(
        "add {k} to each number",
        lambda values, k: [v + k for v in values],
        "values = [v + {k} for v in values]",
    ),
    _Step(
        "multiply each number by {k}",
        lambda values, k: [v * k for v in values],
        "values = [v * {k} for v in values]",
    ),
    _Step(
        "keep every second number, beginning with the first",
        lambda values, k: values[::2],
        "values = values[::2]",
    ),
    _Step(
        "reverse the order",
        lambda values, k: values[::-1],
        "values = values[::-1]",
    ),
    _Step(
        "replace each number by the sum of all up to and including it",
        lambda values, k: [sum(values[: i + 1]) for i in range(len(values))],
        "values = [sum(values[: i + 1]) for i in range(len(values))]",
    ),
)
_ENDS: tuple[tuple[str, Callable[[list[int]], str], str], ...] = (
    ("the sum", lambda values: str(sum(values)), "print(sum(values))"),
    ("how many numbers are left", lambda values: str(len(values)), "print(len(values))"),
    (
        "the largest number, or 0 if there is none",
        lambda values: str(max(values, default=0)),
        "print(max(values, default=0))",
    ),
    (
        "the numbers, with a space between them",
        lambda values: " ".join(map(str, values)),
        "print(*values)",
    ),
)


def program(rng: random.Random, difficulty: int, slips: float) -> tuple[str, str, str]:
    """Question, tests as JSON of Eurus-2-RL-Data, worked answer; `difficulty` operations."""
    steps = [(_pick(rng, _STEPS), 2 + int(rng.random() * 8)) for _ in range(difficulty)]
    name, finish, last = _pick(rng, _ENDS)
    sentences = "; then ".join(step.sentence.format(k=k) for step, k in steps)
    question = (
        "The input is one line of integers with spaces between them. First "
        f"{sentences}. Print {name}.\n"
    )
    inputs, outputs = [], []
    for _ in range(_TESTS):
        values = [int(rng.random() * 61) - 20 for _ in range(1 + int(rng.random() * _LONGEST))]
        inputs.append(" ".join(map(str, values)) + "\n")
        for step, k in steps:
            values = step.apply(values, k)
        outputs.append(finish(values) + "\n")
    lines = ["values = [int(word) for word in input().split()]"]
    lines += [step.line.format(k=k) for step, k in steps if rng.random() >= slips]
    worked = "\n".join(["```python", *lines, last, "```"])
    return question, json.dumps({"inputs": inputs, "outputs": outputs}), worked


def _pick(rng: random.Random, choices: Sequence[_T]) -> _T:
    return choices[int(rng.random() * len(choices))]
