"""Is the boxed answer of a solution its ground truth? Asked of the project's own verifier.

Most are equal letter by letter and settled here. The others go through the same pool of killable
workers as a run's rollouts, for the same reason: SymPy may hang on what people write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

from megatron_prime.prepare.items import Dropped, Item, drop
from megatron_prime.prepare.text import shorten
from megatron_prime.verify.math_answer import boxed_answer

# (response, ground truth) pairs → does each match; None if the verifier failed
Grader = Callable[[Sequence[tuple[str, str]]], list[bool | None]]


class PoolGrader:
    """A Grader on `workers` processes, which start with the first pair."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._workers, self._timeout_s = workers, timeout_s
        self._stack = ExitStack()
        self._pool: object | None = None

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Grade each pair; the order is kept."""
        from megatron_prime.types import Group, Prompt, Rollout
        from megatron_prime.verify.pool import VerifierPool

        if not isinstance(self._pool, VerifierPool):
            self._pool = self._stack.enter_context(VerifierPool(self._workers, self._timeout_s))
        groups = [
            Group(
                Prompt(i, (0,), truth, "math", "prepare"), (Rollout((0,), (0.0,), "stop", 0, text),)
            )
            for i, (text, truth) in enumerate(pairs)
        ]
        verified = self._pool.verify(groups)
        return [None if g.checker_failures else g.outcome_rewards[0] == 1.0 for g in verified]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def check_golds(items: Sequence[Item], grade: Grader) -> list[Item | Dropped]:
    """Each item whose solution boxes nothing or the ground truth; the others dropped."""
    checked: list[Item | Dropped] = list(items)
    asked: list[tuple[int, str]] = []
    for i, item in enumerate(items):
        boxed = boxed_answer(item.solution) if item.solution and item.ground_truth else None
        if boxed is not None and boxed != item.ground_truth:
            asked.append((i, boxed))
    if not asked:
        return checked
    pairs = [(rf"\boxed{{{boxed}}}", items[i].ground_truth) for i, boxed in asked]
    for (i, boxed), match in zip(asked, grade(pairs), strict=True):
        why = f"the solution boxes {shorten(boxed, 60)!r}, not {items[i].ground_truth!r}"
        if match is None:
            checked[i] = drop(items[i], "unchecked", why)
        elif not match:
            checked[i] = drop(items[i], "unmatched", why)
    return checked
