r"""Sets of real numbers: intervals, points, unions, differences, and when two of them are equal.

Two sets whose ends are known numbers are compared by membership: sort all ends of both, then ask
for each end and each gap between two of them whether it belongs to both sets or to neither. So a
union may be written in any order or in pieces, and no case is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from megatron_prime.verify.math_notation import UnreadableError
from megatron_prime.verify.math_numbers import real_value, same
from megatron_prime.verify.math_tree import Node

Same = Callable[[Node, Node], bool]


@dataclass(frozen=True, slots=True)
class Span:
    """An interval; None is infinity, of the side where it stands."""

    low: Node | None
    high: Node | None
    low_closed: bool = False
    high_closed: bool = False


@dataclass(frozen=True, slots=True)
class Points:
    """Finitely many numbers."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Combined:
    """`or` is the union, `and` the intersection, `not` the first without the second."""

    name: str
    parts: tuple[RealSet, ...]


RealSet = Span | Points | Combined
LINE = Span(None, None)


def equal_sets(gold: RealSet, answer: RealSet, same_end: Same) -> bool:
    """Whether both are the same set; `same_end(of gold, of answer)` compares two ends."""
    try:
        golden, given = _sorted(_ends(gold)), _sorted(_ends(answer))
    except UnreadableError:  # ends with variables: written alike, or not at all
        return _alike(gold, answer, same_end)
    ends: list[tuple[Node, Node]] = []  # as gold has it, as the answer has it
    while golden or given:
        if golden and given and same_end(golden[0], given[0]):
            ends.append((golden.pop(0), given.pop(0)))
        elif not given or (golden and real_value(golden[0]) < real_value(given[0])):
            ends.append((golden[0], golden.pop(0)))
        else:
            ends.append((given[0], given.pop(0)))
    return all(
        _has(gold, place, [end for end, _ in ends]) == _has(answer, place, [end for _, end in ends])
        for place in range(2 * len(ends) + 1)
    )


def _ends(real_set: RealSet) -> list[Node]:
    if isinstance(real_set, Span):
        return [end for end in (real_set.low, real_set.high) if end is not None]
    if isinstance(real_set, Points):
        return list(real_set.nodes)
    return [end for part in real_set.parts for end in _ends(part)]


def _sorted(ends: list[Node]) -> list[Node]:
    """In order, each number once."""
    found = sorted(ends, key=real_value)
    return found[:1] + [other for one, other in pairwise(found) if not same(one, other)]


def _has(real_set: RealSet, place: int, ends: list[Node]) -> bool:
    """Whether a place is in the set: 2i + 1 is the end i, 2i the gap before it."""
    if isinstance(real_set, Combined):
        inside = [_has(part, place, ends) for part in real_set.parts]
        if real_set.name == "not":
            return inside[0] and not inside[1]
        return any(inside) if real_set.name == "or" else all(inside)
    if isinstance(real_set, Points):
        return any(place == _place(node, ends) for node in real_set.nodes)
    low = -1 if real_set.low is None else _place(real_set.low, ends)
    high = 2 * len(ends) + 1 if real_set.high is None else _place(real_set.high, ends)
    return (
        low < place < high
        or (place == low == high and real_set.low_closed and real_set.high_closed)
        or (place == low < high and real_set.low_closed)
        or (place == high > low and real_set.high_closed)
    )


def _place(node: Node, ends: list[Node]) -> int:
    return next(2 * i + 1 for i, end in enumerate(ends) if end == node or same(end, node))


def _alike(gold: RealSet, answer: RealSet, same_end: Same) -> bool:
    def alike_end(one: Node | None, other: Node | None) -> bool:
        return one is other if one is None or other is None else same_end(one, other)

    if isinstance(gold, Span) and isinstance(answer, Span):
        closed = (gold.low_closed, gold.high_closed) == (answer.low_closed, answer.high_closed)
        return closed and alike_end(gold.low, answer.low) and alike_end(gold.high, answer.high)
    if isinstance(gold, Points) and isinstance(answer, Points):
        return len(gold.nodes) == len(answer.nodes) and all(map(same_end, gold.nodes, answer.nodes))
    if isinstance(gold, Combined) and isinstance(answer, Combined):
        return (
            gold.name == answer.name
            and len(gold.parts) == len(answer.parts)
            and all(
                _alike(*parts, same_end) for parts in zip(gold.parts, answer.parts, strict=True)
            )
        )
    return False
