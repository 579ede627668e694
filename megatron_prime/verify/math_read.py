r"""From tokens to typed values. The first reader that recognises its kind of answer has it.

The order matters: lists are split before relations (`x = 1, y = 2`), relations before brackets
(`(x, y) = (1, 2)`), brackets before expressions. What no reader wants is an expression, and what is
no expression either is `Unread`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from megatron_prime.verify.math_expression import parse_expression
from megatron_prime.verify.math_matrix import read_matrix
from megatron_prime.verify.math_notation import (
    Tokens,
    UnreadableError,
    closes,
    split,
    tokenize,
    words,
)
from megatron_prime.verify.math_numbers import same
from megatron_prime.verify.math_relations import INEQUALITIES, combined, inequality, interval
from megatron_prime.verify.math_sets import LINE, Combined, Span
from megatron_prime.verify.math_single import read_numeral, read_ratio, read_residue, read_scalar
from megatron_prime.verify.math_tree import Number, symbols
from megatron_prime.verify.math_types import (
    Choice,
    Finite,
    Line,
    Listing,
    Named,
    Ordered,
    Relation,
    Scalar,
    Unread,
    Value,
)
from megatron_prime.verify.math_words import read_words

MAX_ITEMS = 100
_LETTERS = words("A B C D E F G H I J")
_OPTION = re.compile(
    r'"(?:(?:option|choice|answer) [(]?([A-J])|[(]\s*([A-J])\s*[)]|((?-i:[A-J])))[) .:]*',
    re.IGNORECASE,
)
_SEPARATORS = (",", ";", '"and', '"or')
_NEEDLESS = frozenset(['"answer', '"the answer is', '"answer is', "=", ":", r"\approx", ",", ";"])
_INFINITE = ((r"\infty",), ("+", r"\infty"), ("-", r"\infty"))


def read(text: str, thousands: bool = True) -> Value:
    """The value of an answer; UnreadableError if there is nothing to read."""
    return _value(tokenize(text, thousands))


def _value(tokens: Tokens) -> Value:
    tokens = _stripped(tokens)
    for reader in _READERS:
        value = reader(tokens)
        if value is not None:
            return value
    return read_scalar(tokens)


def _stripped(tokens: Tokens) -> Tokens:
    while tokens:
        if tokens[0].lower().rstrip(": ") in _NEEDLESS or tokens[0] in _NEEDLESS:
            tokens = tokens[1:]
        elif tokens[-1] in _NEEDLESS or tokens[-1] == ".":
            tokens = tokens[:-1]
        elif tokens[0] == "{" and closes(tokens) == len(tokens) - 1:
            tokens = tokens[1:-1]
        else:
            return tokens
    raise UnreadableError("nothing there")


def _read_choice(tokens: Tokens) -> Value | None:
    written = _OPTION.fullmatch(tokens[0])
    if written:
        first = (written[1] or written[2] or written[3]).upper()
        rest = tokens[1:]
    elif len(tokens) > 2 and tokens[0] == "(" and tokens[1] in _LETTERS and tokens[2] == ")":
        first, rest = tokens[1], tokens[3:]
    elif len(tokens) > 1 and tokens[0] in _LETTERS and tokens[1] in (")", ":", "."):
        first, rest = tokens[0], tokens[2:]
    elif len(tokens) == 1 and tokens[0] in _LETTERS:
        first, rest = tokens[0], ()
    else:
        return None
    rest = rest[1:] if rest[:1] in ((")",), (":",), (".",)) else rest
    if rest and (rest[0] in ("(", "^", "_", "+", "-", "*", "/", "!", "=", *_SEPARATORS)):
        return None
    if _names_option(rest):  # (A) 12 (B) 13 chooses nothing
        return None
    return Choice(first, _value(rest) if rest else None)


def _names_option(tokens: Tokens) -> bool:
    """Whether the letter of a choice stands somewhere in `tokens`."""
    if len(tokens) == 1 and tokens[0] in _LETTERS:
        return True
    bracketed = zip(tokens, tokens[1:], tokens[2:], strict=False)
    return any(map(_OPTION.fullmatch, tokens)) or any(
        letter in _LETTERS and (opening, end) == ("(", ")") for opening, letter, end in bracketed
    )


def _read_list(tokens: Tokens) -> Value | None:
    parts, separators = split(tokens, _SEPARATORS)
    kept = [_stripped(part) for part in parts if part]
    if not separators or len(kept) > MAX_ITEMS:
        return None
    if not kept:
        raise UnreadableError("separators alone")
    kept = [part for part in kept if not _is_family(part)] or kept
    items: list[Value] = []
    for part in kept:
        item = _value(part)
        items += item.items if isinstance(item, Listing) else (item,)
    if len(items) == 1:
        return items[0]
    if any(isinstance(item, Line) and item.variable for item in items):
        return combined(items, '"or' in separators)
    return Listing(tuple(items))


def _is_family(part: Tokens) -> bool:
    r"""`k \in \mathbb{Z}`, behind a family of solutions."""
    return len(part) > 2 and part[1] == r"\in" and part[2:3] == (r"\mathbb",)


def _read_relation(tokens: Tokens) -> Value | None:
    for arrow in (r"\Rightarrow", r"\implies", r"\Longrightarrow", r"\rightarrow"):
        conclusions, arrows = split(tokens, (arrow,))  # none inside of brackets
        if arrows:
            return _value(conclusions[-1])
    parts, signs = split(tokens, ("=", r"\in", r"\approx", r"\equiv", r"\neq", *INEQUALITIES))
    if not signs or not all(parts):
        return None
    if signs == [r"\in"]:
        is_named = any(token.isalpha() or token[0] in '"\\' for token in parts[0])
        return _value(parts[1]) if is_named else Unread(tokens)
    if signs[-1] == r"\approx":
        exactly = len(parts) > 2 or _name(parts[0]) is None
        return _value(parts[-2] if exactly else parts[-1])
    if set(signs) <= {"=", r"\equiv"}:
        return _equation(parts)
    return inequality(parts, signs)


def _equation(parts: list[Tokens]) -> Value:
    name, value = _name(parts[0]), parts[-1]
    if name is None and len(parts) == 2 and _name(value) is not None:
        name, value = _name(value), parts[0]
    relation = None
    if len(parts) == 2:
        try:
            relation = Relation(parse_expression(parts[0]), "=", parse_expression(parts[1]))
        except UnreadableError:
            relation = None
    if name is not None:
        if any(_contradicts(middle, parts[0], value) for middle in parts[1:-1]):
            return Unread(tuple(token for part in parts for token in (*part, "="))[:-1])
        return Named(name, _value(value), relation, "+" not in name)
    if relation is None:
        return _value(value) if len(parts) > 2 else Unread((*parts[0], "=", *parts[1]))
    return relation


def _contradicts(middle: Tokens, name: Tokens, last: Tokens) -> bool:
    """Whether `x = middle = last` says two things: x = 7 (not) x = 8, or x = 7 = 8."""
    if middle[-len(name) :] == name:
        return True
    one, other = read_scalar(middle), read_scalar(last)
    if isinstance(one, Unread):
        return any(token[0] == '"' for token in middle)
    if not isinstance(other, Scalar) or symbols(one.node) or one.unit or other.unit:
        return False
    return one.rounding is None and other.rounding is None and not same(one.node, other.node)


_NAME = re.compile(
    r"(?:m?\\angle|\\triangle|\\overline\{)?(?:[A-Za-z]|\\[A-Za-z]+){1,3}\}?'*"
    r"(?:_(?:[A-Za-z0-9]|\{[^{}]*\}))?'*(?:\([^()]*\)|\^\{-1\}\([^()]*\))?"
)
_SUM = re.compile(r"[A-Za-z]{1,3}(?:[+:][A-Za-z]{1,3})+")
_TUPLE = re.compile(r"\([A-Za-z](?:,[A-Za-z])+\)")
_NO_NAMES = re.compile(
    r"\\(?:frac|sqrt|sin|cos|tan|log|ln|pi|infty|emptyset|binom|pm|begin)|^[ei]$"
)


def _name(tokens: Tokens) -> str | None:
    r"""The name of what an equation defines: a variable, f(x), \angle ABC, words, m + n."""
    if all(token[0] == '"' for token in tokens):
        return " ".join(tokens)
    if tokens[:1] == ("{",) and closes(tokens) == len(tokens) - 1:  # of \mathbf{A}
        tokens = tokens[1:-1]
    joined = "".join(tokens)
    if len(joined) > 40 or _NO_NAMES.search(joined):
        return None
    if _NAME.fullmatch(joined.strip("|")) or _SUM.fullmatch(joined) or _TUPLE.fullmatch(joined):
        return joined
    return joined if re.fullmatch(r"\[[A-Z]{3,4}\]", joined) else None


def _read_set(tokens: Tokens) -> Value | None:
    joined = "".join(tokens)
    if joined in (r"\mathbb{R}", r"\mathbbR", r"(-\infty,\infty)", r"(-\infty,+\infty)"):
        return Line(LINE)
    if joined in (r"\emptyset", r"\{\}", r"\{\emptyset\}"):
        return Finite(())
    if joined in (r"\mathbb{R}^+", r"\mathbb{R}^{+}", r"\mathbb{R}_{>0}", r"\mathbb{R}_+"):
        return Line(Span(Number(Fraction(0)), None))
    parts, signs = split(tokens, (r"\cup", r"\cap", r"\setminus"))
    if not signs:
        return None
    if not all(parts) or len(parts) > MAX_ITEMS:
        return Unread(tokens)
    whole = interval(_value(parts[0]))
    for sign, part in zip(signs, parts[1:], strict=True):
        name = {r"\cup": "or", r"\cap": "and"}.get(sign, "not")
        other = interval(_value(part))
        if whole is None or other is None:
            return Unread(tokens)
        whole = Combined(name, (whole, other))
    return Unread(tokens) if whole is None else Line(whole)


def _read_brackets(tokens: Tokens) -> Value | None:
    opening, end = tokens[0], tokens[-1]
    if (opening == "]" or end == "[") and opening in "[]" and end in "[]":  # ]0,1[
        parts, _ = split(tokens[1:-1], (",", ";"))
        return _span(parts, opening == "[", end == "]") if len(parts) == 2 else None
    if opening not in ("(", "[", r"\{", r"\langle") or closes(tokens) != len(tokens) - 1:
        return None
    parts, _ = split(tokens[1:-1], (",", ";"))
    if len(parts) > MAX_ITEMS or not all(parts):
        return Unread(tokens)
    if opening == r"\{":
        return _braces(tokens[1:-1], parts)
    if len(parts) == 1:
        return None if opening == r"\langle" else _value(tokens[1:-1])
    is_infinite = any(part in _INFINITE for part in parts)
    if len(parts) == 2 and opening != r"\langle" and ((opening, end) != ("(", ")") or is_infinite):
        return _span(parts, opening == "[", end == "]")
    if any(sign in tokens for sign in (r"\pm", r"\mp")):
        return _read_plus_minus(tokens)
    return Ordered(tuple(_value(part) for part in parts), opening)


def _braces(inside: Tokens, parts: list[Tokens]) -> Value:
    condition, bars = split(inside, (":", "|"))
    of_what = condition[0]
    if len(bars) == 1 and of_what and of_what[0].isalpha() and of_what[1:2] in ((), (r"\in",)):
        return _value(condition[1])  # {x : x > 2}
    items: list[Value] = []
    for part in parts:
        item = _value(part)
        items += item.items if isinstance(item, Listing) else (item,)
    return Finite(tuple(items))


def _span(parts: list[Tokens], low_closed: bool, high_closed: bool) -> Value:
    low, high = (None if part in _INFINITE else parse_expression(part) for part in parts)
    if parts[0] in _INFINITE[:2] or parts[1] == _INFINITE[2]:
        raise UnreadableError("an interval that ends before it begins")
    return Line(Span(low, high, low_closed and low is not None, high_closed and high is not None))


def _read_plus_minus(tokens: Tokens) -> Value | None:
    if r"\pm" not in tokens and r"\mp" not in tokens:
        return None
    signs = ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
    values = (_value(tuple(sign.get(token, token) for token in tokens)) for sign in signs)
    return Listing(tuple(values))


_READERS: tuple[Callable[[Tokens], Value | None], ...] = (
    _read_choice, read_words, _read_list, _read_relation, _read_set, _read_brackets,
    read_matrix, _read_plus_minus, read_residue, read_ratio, read_numeral,
)  # fmt: skip
