"""Trees of expressions: exact numbers, symbols, operations. Sums and products are flat."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """+ and * of any number of nodes, ^, a constant or a function."""

    name: str
    args: tuple[Node, ...] = ()


Node = Number | Symbol | Operation

MINUS_ONE = Number(Fraction(-1))


def add(*nodes: Node) -> Node:
    """A sum."""
    return nodes[0] if len(nodes) == 1 else Operation("+", nodes)


def multiply(*nodes: Node) -> Node:
    """A product."""
    return nodes[0] if len(nodes) == 1 else Operation("*", nodes)


def negative(node: Node) -> Node:
    """Minus `node`."""
    return Number(-node.value) if isinstance(node, Number) else multiply(MINUS_ONE, node)


def divide(above: Node, below: Node) -> Node:
    """A quotient."""
    if isinstance(above, Number) and isinstance(below, Number) and below.value:
        return Number(above.value / below.value)
    return multiply(above, Operation("^", (below, MINUS_ONE)))


def symbols(node: Node) -> frozenset[str]:
    """The names of the variables."""
    if isinstance(node, Operation):
        return frozenset().union(*map(symbols, node.args))
    return frozenset([node.name]) if isinstance(node, Symbol) else frozenset()


def digits(node: Node) -> int:
    """At least the digits of the longest number."""
    if isinstance(node, Number):
        return max(node.value.numerator.bit_length(), node.value.denominator.bit_length()) // 3
    return max(map(digits, node.args), default=0) if isinstance(node, Operation) else 0
