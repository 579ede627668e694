r"""Matrices and vectors: `\begin{pmatrix}…\end{pmatrix}`, an array in brackets, a factor before."""

from __future__ import annotations

from megatron_prime.verify.math_expression import parse_expression
from megatron_prime.verify.math_notation import Tokens, UnreadableError
from megatron_prime.verify.math_tree import Node, multiply
from megatron_prime.verify.math_types import Matrix, Unread, Value

MAX_CELLS = 200
_KINDS = tuple(
    rf"\begin{{{kind}}}"
    for kind in ("pmatrix", "bmatrix", "matrix", "array", "Bmatrix", "smallmatrix")
)


def read_matrix(tokens: Tokens) -> Value | None:
    """The matrix that `tokens` are; None if none begins here."""
    place = next((i for i, token in enumerate(tokens) if token.startswith(r"\begin")), None)
    if place is None:
        return None
    begin = tokens[place]
    if begin not in _KINDS:
        return Unread(tokens)
    factor, rest = tokens[:place], tokens[place + 1 :]
    if factor[-1:] in (("(",), ("[",)) and rest[-1:] in ((")",), ("]",)):
        factor, rest = factor[:-1], rest[:-1]
    if rest[-1:] != (begin.replace("begin", "end"),) or len(rest) < 2:
        return Unread(tokens)
    rest = rest[:-1]
    if begin == r"\begin{array}" and rest[0] == "{":
        rest = rest[rest.index("}") + 1 :]
    factor = factor[:-1] if factor[-1:] == ("*",) else factor
    try:
        rows = [[parse_expression(cell) for cell in cells] for cells in _cells(rest)]
        scale = parse_expression(factor) if factor else None
    except UnreadableError:
        return Unread(tokens)
    if len({len(row) for row in rows}) != 1 or len(rows) * len(rows[0]) > MAX_CELLS:
        return Unread(tokens)
    return Matrix(tuple(tuple(_scaled(scale, cell) for cell in row) for row in rows))


def _cells(tokens: Tokens) -> list[list[Tokens]]:
    rows: list[list[list[str]]] = [[[]]]
    for token in tokens:
        if token == "\\\\":
            rows.append([[]])
        elif token == "&":
            rows[-1].append([])
        elif token != r"\hline":
            rows[-1][-1].append(token)
    if rows[-1] == [[]]:
        rows.pop()
    return [[tuple(cell) for cell in row] for row in rows]


def _scaled(scale: Node | None, cell: Node) -> Node:
    return cell if scale is None else multiply(scale, cell)
