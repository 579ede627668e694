r"""Inequalities as the sets that they describe, where they can be solved by one division.

`x > 2`, `2 < x`, `2x > 4` and `(2,\infty)` are one set, and so are `1 < x \le 3` and `(1,3]`.
What has several variables or powers stays a relation; two relations are the same if their
differences left - right are proportional, with a positive factor for inequalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from megatron_prime.verify.math_expression import parse_expression
from megatron_prime.verify.math_notation import Tokens, UnreadableError
from megatron_prime.verify.math_numbers import real_value, same
from megatron_prime.verify.math_sets import LINE, Combined, Points, RealSet, Span
from megatron_prime.verify.math_tree import (
    MINUS_ONE,
    Node,
    Number,
    Operation,
    Symbol,
    add,
    divide,
    multiply,
    negative,
    symbols,
)
from megatron_prime.verify.math_types import (
    Finite,
    Line,
    Listing,
    Named,
    Ordered,
    Relation,
    Scalar,
    Value,
)

INEQUALITIES = ("<", ">", r"\leq", r"\geq")
_TURNED = {">": "<", r"\geq": r"\leq"}


def inequality(parts: list[Tokens], signs: list[str]) -> Value:
    """The value of `a < x <= b`, `2x > 4`, `x != 3` and the like."""
    links: list[Value] = []
    variables: set[str] = set()
    for (left, right), sign in zip(pairwise(parts), signs, strict=True):
        infinite = [_is_infinite(left), _is_infinite(right)]
        if any(infinite):  # x < infinity says nothing
            continue
        link = _link(parse_expression(left), sign, parse_expression(right))
        links.append(link)
        if isinstance(link, Line) and link.variable is not None:
            variables.add(link.variable)
    if not links:
        return Line(LINE, "")
    if len(links) == 1:
        return links[0]
    lines = [link.real_set for link in links if isinstance(link, Line)]
    if len(lines) < len(links) or len(variables) != 1:
        raise UnreadableError("a chain of inequalities of several variables")
    return Line(Combined("and", tuple(lines)), variables.pop())


def _is_infinite(tokens: Tokens) -> bool:
    return tokens[-1:] == (r"\infty",) and len(tokens) <= 2


def _link(left: Node, sign: str, right: Node) -> Value:
    if sign in _TURNED:
        left, sign, right = right, _TURNED[sign], left
    names = symbols(left) | symbols(right)
    relation = Relation(left, sign, right)
    if len(names) != 1:
        return relation
    (name,) = names
    if left == Symbol(name) and name not in symbols(right):
        bound, is_upper = right, True
    elif right == Symbol(name) and name not in symbols(left):
        bound, is_upper = left, False
    else:
        solved = _solved(add(left, negative(right)), name)
        if solved is None:
            return _distance(left, sign, right) or relation
        bound, is_upper = solved
    if sign == r"\neq":
        return Line(Combined("not", (LINE, Points((bound,)))), name)
    closed = sign == r"\leq"
    span = Span(None, bound, False, closed) if is_upper else Span(bound, None, closed, False)
    return Line(span, name)


def _distance(left: Node, sign: str, right: Node) -> Value | None:
    """|x - 1| < 3 and 3 < |x - 1|; None if it isn't of this kind."""
    is_near = isinstance(left, Operation) and left.name == "abs"
    absolute, bound = (left, right) if is_near else (right, left)
    if not isinstance(absolute, Operation) or absolute.name != "abs" or symbols(bound):
        return None
    inside = absolute.args[0]
    if is_near:
        links = _link(negative(bound), sign, inside), _link(inside, sign, bound)
    else:
        links = _link(inside, sign, negative(bound)), _link(bound, sign, inside)
    lines = [link for link in links if isinstance(link, Line)]
    if len(lines) < len(links) or sign == r"\neq":
        return None
    name = "and" if is_near else "or"
    return Line(Combined(name, tuple(line.real_set for line in lines)), lines[0].variable)


def _solved(difference: Node, name: str) -> tuple[Node, bool] | None:
    """Where a linear function is 0, and whether it rises; None if it isn't linear."""
    start = replaced(difference, name, Number(Fraction(0)))
    slope = add(replaced(difference, name, Number(Fraction(1))), negative(start))
    try:
        steep = real_value(slope)
        if not steep or not same(difference, add(start, multiply(slope, Symbol(name)))):
            return None
    except UnreadableError:
        return None
    return divide(negative(start), slope), bool(steep > 0)


def replaced(node: Node, name: str, value: Node) -> Node:
    """`node` with a value for a variable."""
    if isinstance(node, Operation):
        return Operation(node.name, tuple(replaced(arg, name, value) for arg in node.args))
    return value if node == Symbol(name) else node


def combined(items: Sequence[Value], is_union: bool) -> Value:
    """Several inequalities, joined by `or`, else by `and` or a comma."""
    sets = [interval(item) for item in items]
    known = tuple(one for one in sets if one is not None)
    variables = {item.variable for item in items if isinstance(item, Line)} - {None}
    if len(known) < len(sets) or len(variables) != 1:
        return Listing(tuple(items))
    return Line(Combined("or" if is_union else "and", known), variables.pop())


def interval(value: Value) -> RealSet | None:
    """The set of numbers that a value can be read as; None if it can't."""
    if isinstance(value, Line):
        return value.real_set
    if isinstance(value, Named):
        return interval(value.value)
    if isinstance(value, Scalar):
        return None if value.unit else Points((value.node,))
    if isinstance(value, Finite | Listing):
        parts = [interval(item) for item in value.items]
        known = tuple(part for part in parts if part is not None)
        return Combined("or", known) if len(known) == len(parts) else None
    if isinstance(value, Ordered) and value.brackets == "(" and len(value.items) == 2:
        low, high = value.items
        if isinstance(low, Scalar) and isinstance(high, Scalar):
            return Span(low.node, high.node)
    return None


def same_relation(gold: Relation, answer: Relation) -> bool:
    """Whether one is the other times a factor."""
    if gold.sign != answer.sign:
        return False
    golden, given = (add(one.left, negative(one.right)) for one in (gold, answer))
    names = sorted(symbols(golden))
    if not names or names != sorted(symbols(given)):
        return False
    draws = [Fraction(41, 29), Fraction(-17, 23), Fraction(31, 11)]
    for shift in draws:
        point_golden, point_given = golden, given
        for turn, name in enumerate(names, 1):
            value = Number(shift + Fraction(turn * turn, 7))
            point_golden = replaced(point_golden, name, value)
            point_given = replaced(point_given, name, value)
        if same(point_golden, Number(Fraction(0))) or same(point_given, Number(Fraction(0))):
            continue
        try:
            factor = real_value(divide(point_given, point_golden))
        except UnreadableError:
            continue
        if factor < 0 and gold.sign in ("<", r"\leq"):
            return False
        left = multiply(given, Operation("^", (point_given, MINUS_ONE)))
        right = multiply(golden, Operation("^", (point_golden, MINUS_ONE)))
        return same(left, right)
    return False
