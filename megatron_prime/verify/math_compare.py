r"""When is an answer the gold answer? The gold decides how it is read; other kinds differ.

A pair is no set and no interval that is closed, a length no area. Where the kinds agree the parts
are compared, in order for tuples and matrices, in any order for sets and roots. Two freedoms are
the gold's: a decimal gold leaves open what its last digit leaves open, and a gold without unit or
name takes any. So `equal(gold, answer)` is not symmetric.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_prime.verify.math_numbers import same
from megatron_prime.verify.math_quantities import (
    same_numerals,
    same_ratios,
    same_residues,
    same_scalars,
)
from megatron_prime.verify.math_relations import interval, same_relation
from megatron_prime.verify.math_sets import equal_sets
from megatron_prime.verify.math_tree import symbols
from megatron_prime.verify.math_types import (
    Choice,
    Finite,
    Line,
    Listing,
    Matrix,
    Named,
    Numeral,
    Ordered,
    Ratio,
    Relation,
    Residue,
    Scalar,
    Text,
    Time,
    Unread,
    Value,
)
from megatron_prime.verify.math_words import plain

MAX_UNORDERED = 30  # items whose order is free: each may meet each


def equal(gold: Value, answer: Value) -> bool:
    """Whether `answer` is right where `gold` is the truth."""
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _named(gold, answer)
    if isinstance(gold, Choice) or isinstance(answer, Choice):
        return _choices(gold, answer)
    if isinstance(gold, Text) or isinstance(answer, Text):
        return _spelling(gold) is not None and _spelling(gold) == _spelling(answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations(gold, answer)
    if isinstance(gold, Line) or isinstance(answer, Line):
        return _lines(gold, answer)
    if isinstance(gold, Scalar | Unread) and isinstance(answer, Scalar | Unread):
        return same_scalars(gold, answer)
    if isinstance(gold, Residue) or isinstance(answer, Residue):
        return same_residues(gold, answer)
    if isinstance(gold, Numeral) or isinstance(answer, Numeral):
        return same_numerals(gold, answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _matrices(gold, answer)
    if isinstance(gold, Ratio | Time) or isinstance(answer, Ratio | Time):
        return same_ratios(gold, answer)
    return _collections(gold, answer)


def _named(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name and equal(gold.value, answer.value):
            return True
        functions = all("(" in name or name in "yz" for name in (gold.name, answer.name))
        if functions and gold.name != answer.name and equal(gold.value, answer.value):
            return True
        one, other = gold.relation, answer.relation
        return one is not None and other is not None and same_relation(one, other)
    if isinstance(gold, Named):
        if isinstance(answer, Relation):
            return gold.relation is not None and same_relation(gold.relation, answer)
        return gold.is_plain and equal(gold.value, answer)
    assert isinstance(answer, Named), "the caller has looked"
    if isinstance(gold, Relation):
        return answer.relation is not None and same_relation(gold, answer.relation)
    return equal(gold, answer.value)


def _choices(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        return gold.letter == answer.letter
    if isinstance(gold, Choice):
        return gold.content is not None and equal(gold.content, answer)
    assert isinstance(answer, Choice), "the caller has looked"
    return answer.content is not None and equal(gold, answer.content)


def _spelling(value: Value) -> str | None:
    """What a value says, where it may be words."""
    if isinstance(value, Text):
        return value.words
    if isinstance(value, Scalar | Unread):
        if any(re.search(r"[\\+*/^0-9=]", token) for token in value.tokens):
            return None
        return plain("".join(value.tokens).replace('"', " "))
    if isinstance(value, Finite) and not value.items:
        return "none"
    return None


def _relations(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return same_relation(gold, answer)
    if isinstance(gold, Scalar) and isinstance(answer, Relation) and answer.sign == "=":
        if symbols(answer.right) or symbols(answer.left):  # 2x = 5 doesn't say that x is 5
            return False
        # 2^3 = 8 where 8 is wanted
        return same(answer.left, answer.right) and equal(gold, Scalar(answer.right))
    return False


def _lines(gold: Value, answer: Value) -> bool:
    names = {one.variable for one in (gold, answer) if isinstance(one, Line)} - {None, ""}
    if len(names) > 1:
        return False
    golden, given = interval(gold), interval(answer)
    return golden is not None and given is not None and equal_sets(golden, given, same)


def _matrices(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return len(gold.rows) == len(answer.rows) and all(
            len(one) == len(other) and all(map(same, one, other))
            for one, other in zip(gold.rows, answer.rows, strict=True)
        )
    one, other = _vector(gold), _vector(answer)
    return (
        one is not None
        and other is not None
        and len(one) == len(other)
        and all(map(equal, one, other))
    )


def _vector(value: Value) -> Sequence[Value] | None:
    if isinstance(value, Ordered):
        return value.items
    if isinstance(value, Matrix) and 1 in (len(value.rows), len(value.rows[0])):
        return [Scalar(cell) for row in value.rows for cell in row]
    return None


def _collections(gold: Value, answer: Value) -> bool:
    golden, given = _items(gold), _items(answer)
    if golden is None or given is None:
        return False
    kinds = {type(gold), type(answer)}
    if Ordered in kinds:
        # x = 1, y = 2 is a pair; 1, 2 are roots
        alike = kinds == {Ordered} or _has_names(gold) or _has_names(answer)
        return alike and len(golden) == len(given) and all(map(equal, golden, given))
    if kinds == {Listing} and all(isinstance(item, Named) for item in (*golden, *given)):
        names = [{item.name for item in items} for items in (golden, given)]  # type: ignore[union-attr]
        if len(names[0]) == len(golden) and names[0] != names[1] and not _one_root(golden, given):
            return False
    if max(len(golden), len(given)) > MAX_UNORDERED:
        return False
    if Finite in kinds:
        golden, given = (_distinct(items) for items in (golden, given))
    return len(golden) == len(given) and _matched(list(golden), list(given))


def _items(value: Value) -> Sequence[Value] | None:
    """The parts of a collection; one value is a collection of one."""
    if isinstance(value, Finite | Ordered):
        return value.items
    if not isinstance(value, Listing):
        return [value]
    names = [item.name for item in value.items if isinstance(item, Named)]
    if len(names) < len(value.items):
        return [item.value if isinstance(item, Named) else item for item in value.items]
    if len({_root(name) for name in names}) == 1:  # x_1 = …, x_2 = …: roots
        return [item.value for item in value.items if isinstance(item, Named)]
    if len(set(names)) == len(names):  # x = …, y = …: in the order of the names
        return sorted(value.items, key=lambda item: item.name if isinstance(item, Named) else "")
    return value.items


def _has_names(value: Value) -> bool:
    if not isinstance(value, Listing):
        return False
    names = {item.name for item in value.items if isinstance(item, Named)}
    return len(names) == len(value.items)


def _root(name: str) -> str:
    return name.partition("_")[0]


def _one_root(*collections: Sequence[Value]) -> bool:
    names = {_root(item.name) for items in collections for item in items if isinstance(item, Named)}
    return len(names) == 1


def _distinct(items: Sequence[Value]) -> list[Value]:
    found: list[Value] = []
    for item in items:
        if not any(equal(known, item) for known in found):
            found.append(item)
    return found


def _matched(golden: list[Value], given: list[Value]) -> bool:
    """Whether each of `golden` has a partner of its own; equality is as good as transitive."""
    for gold in golden:
        partner = next((i for i, item in enumerate(given) if equal(gold, item)), None)
        if partner is None:
            return False
        given.pop(partner)
    return True
