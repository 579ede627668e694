r"""Made-up exercises whose answers are known: linear equations, modular arithmetic, small programs.

An exercise has a question, a ground truth that the project's verifiers take, and a worked answer.
`slips` is the share of the answer's steps that its writer gets wrong; it goes on from there, as in
the quickstart's chains: a model that imitates it knows every step and gets few exercises right.
`difficulty`, from 1, makes numbers larger and steps more. What is drawn depends on the random
generator alone, which must be a `random.Random`: its `random()` is the same in all Python versions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_prime.prepare.programs import program


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question, its ground truth and a worked answer, perhaps a wrong one."""

    data_source: str
    ability: str
    question: str
    ground_truth: str
    worked: str


Skill = Callable[[random.Random, int, float], Exercise]


def linear(rng: random.Random, difficulty: int, slips: float) -> Exercise:
    """`solve 3x+5=20:`; from difficulty 3 with x on both sides, from 2 with negative numbers."""
    size = 5 + 5 * difficulty
    low = -size if difficulty > 1 else 1
    x = _draw(rng, low, size)
    b = _draw(rng, low, size)
    c = _draw(rng, 2, 1 + size) if difficulty > 2 else 0
    a = c + _draw(rng, 2, 1 + size)
    right = a * x + b - c * x
    write = _Writer(rng, slips)
    if c:
        write.step(f"{a}x-{c}x={right}{_signed(-b)}")
    factor = a - c
    constant = write.number(right - b)
    write.step(f"{factor}x={constant}")
    found = constant // factor
    write.step(f"x={found}")
    question = f"solve {a}x{_signed(b)}={f'{c}x{_signed(right)}' if c else right}:"
    return Exercise("linear_equations", "math", question, str(x), write.answer(found))


def modular(rng: random.Random, difficulty: int, slips: float) -> Exercise:
    """`(37+58) mod 9=`; from difficulty 2 a product is added, from 3 a power."""
    size, modulus = 10**difficulty, _draw(rng, 3, 5 + 5 * difficulty)
    a, b = _draw(rng, size // 2, size * 2), _draw(rng, size // 2, size * 2)
    terms = [(f"{a}+{b}", a + b)]
    if difficulty > 1:
        a, b = _draw(rng, 2, 9 * difficulty), _draw(rng, 2, 9 * difficulty)
        terms.append((f"{a}*{b}", a * b))
    if difficulty > 2:
        a, b = _draw(rng, 2, 9), _draw(rng, 2, difficulty + 2)
        terms.append((f"{a}^{b}", a**b))
    write = _Writer(rng, slips)
    total = 0
    for text, value in terms:
        written = write.number(value)
        write.step(f"{text}={written}")
        write.step(f"({total}+{written}) mod {modulus}={(total + written) % modulus}")
        total = (total + written) % modulus
    question = f"({'+'.join(text for text, _ in terms)}) mod {modulus}="
    truth = sum(value for _, value in terms) % modulus
    return Exercise("modular_arithmetic", "math", question, str(truth), write.answer(total))


def small_program(rng: random.Random, difficulty: int, slips: float) -> Exercise:
    """What to do with a line of integers, with tests on stdin and stdout."""
    question, tests, worked = program(rng, difficulty, slips)
    return Exercise("small_programs", "code", question, tests, worked)


SKILLS: dict[str, Skill] = {"linear": linear, "modular": modular, "program": small_program}


class _Writer:
    """Steps of a worked answer, in which numbers may slip."""

    def __init__(self, rng: random.Random, slips: float) -> None:
        self._rng, self._slips = rng, slips
        self._steps: list[str] = []

    def number(self, value: int) -> int:
        """The number as it gets written: a slip forgets a carry, so is ten too small."""
        return value - 10 if self._rng.random() < self._slips else value

    def step(self, text: str) -> None:
        """Append a step."""
        self._steps.append(text)

    def answer(self, value: int) -> str:
        """All steps and the boxed answer."""
        return ",".join([*self._steps, rf"\boxed{{{value}}}"])


def _draw(rng: random.Random, low: int, high: int) -> int:
    """A number from low to high."""
    return low + int(rng.random() * (high - low + 1))


def _signed(number: int) -> str:
    """`+5`, `-5`; nothing for 0."""
    return f"{number:+}" if number else ""
