"""What an answer can be: a typed value for each kind of thing that a mathematician would compare.

`math_read.py` makes them from tokens, `math_compare.py` says when two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from megatron_prime.verify.math_notation import Tokens
from megatron_prime.verify.math_sets import RealSet
from megatron_prime.verify.math_tree import Node
from megatron_prime.verify.math_units import Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    """An expression, perhaps with a unit."""

    node: Node
    unit: Unit | None = None
    rounding: Fraction | None = None  # a decimal's: what its last digit leaves open; None if exact
    tokens: Tokens = ()
    is_percent: bool = False  # the node is a hundredth of what is written


@dataclass(frozen=True, slots=True)
class Unread:
    """An expression beyond our language: left to the library, or compared as it is written."""

    tokens: Tokens
    too_large: bool = False


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a base."""

    digits: str
    base: int
    value: Fraction


@dataclass(frozen=True, slots=True)
class Residue:
    """`value mod modulus`."""

    value: Scalar
    modulus: Node


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    words: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter of a choice, with what stands behind it."""

    letter: str
    content: Value | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """Values without brackets: roots, in any order."""

    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Finite:
    """A finite set."""

    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Ordered:
    """A tuple or vector, with its brackets; two numbers in round ones may be an interval."""

    items: tuple[Value, ...]
    brackets: str


@dataclass(frozen=True, slots=True)
class Line:
    """A set of real numbers that has intervals."""

    real_set: RealSet
    variable: str | None = None  # of the inequality that it comes from


@dataclass(frozen=True, slots=True)
class Relation:
    r"""An equation or inequality that isn't solved; the sign is one of = < \leq \neq."""

    left: Node
    sign: str
    right: Node


@dataclass(frozen=True, slots=True)
class Named:
    """`name = value`; with the equation itself, where it can be read as one."""

    name: str
    value: Value
    relation: Relation | None = None
    is_plain: bool = True  # the name is one variable or so, not a sum like m + n


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of a matrix."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`3:2`; of two numbers that look like one, a time of day too."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Time:
    """A time of day; `half` is am, pm or empty."""

    hour: int
    minute: int
    half: str


Value = (
    Scalar
    | Unread
    | Numeral
    | Residue
    | Text
    | Choice
    | Listing
    | Finite
    | Ordered
    | Line
    | Relation
    | Named
    | Matrix
    | Ratio
    | Time
)
