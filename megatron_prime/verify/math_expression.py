r"""Expressions: tokens in, a tree out, by recursive descent. Nothing is ever handed to `eval`.

Read as in print: `2x` is a product, `1\frac{1}{2}` a mixed number, `\sin 2x` the sine of all
of `2x`, `\frac12` a half, `\sin^{-1}` the arcsine. `i` and `e` are the constants.

What this small language lacks (integrals, sums, limits …) raises UnreadableError.
"""

from __future__ import annotations

from fractions import Fraction

from megatron_prime.verify.math_digits import MAX_DIGITS, is_number, number
from megatron_prime.verify.math_notation import (
    CLOSING,
    FUNCTIONS,
    OPENING,
    Tokens,
    UnreadableError,
    words,
)
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
)

MAX_NESTING = 60


_CONSTANTS = {r"\pi": "pi", "e": "e", "i": "i", '"e': "e", '"i': "i", r"\imath": "i"}
_NAMED = {f'"{name}': f"\\{name}" for name in FUNCTIONS} | {'"sqrt': r"\sqrt"}
_CALLS = frozenset([*(f"\\{name}" for name in FUNCTIONS), *_NAMED])
_INVERSES = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot")}
_PAIRS = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_GREEK = words(
    r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa"
    r" \lambda \mu \nu \xi \rho \sigma \tau \upsilon \phi \varphi \chi \psi \omega \Gamma \Delta"
    r" \Theta \Lambda \Xi \Sigma \Phi \Psi \Omega \ell"
)
_FRACTIONS = (r"\frac { # } { # }", r"\frac # { # }", r"\frac { # } #", r"\frac #", "# / #")
_DECORATIONS = frozenset([r"\overline", r"\bar", r"\tilde", r"\dot"])


def parse_expression(tokens: Tokens) -> Node:
    """The tree of an expression; UnreadableError if it is none, or one beyond this language."""
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.token is not None:
        raise UnreadableError(f"found {parser.token!r} behind an expression")
    return node


class _Parser:
    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._place = list(tokens), 0
        self._nesting, self._bars = 0, 0

    @property
    def token(self) -> str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _ahead(self, distance: int) -> str | None:
        place = self._place + distance
        return self._tokens[place] if 0 <= place < len(self._tokens) else None

    def _next(self) -> str:
        token = self.token
        if token is None:
            raise UnreadableError("an expression ends too early")
        self._place += 1
        return token

    def _want(self, wanted: str) -> None:
        found = self._next()
        if found != wanted:
            raise UnreadableError(f"found {found!r}, wanted {wanted!r}")

    def sum(self) -> Node:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise UnreadableError("nested too deeply")
        terms = [self._signed()]
        while self.token in ("+", "-"):
            terms.append(self._signed())
        self._nesting -= 1
        return add(*terms)

    def _signed(self) -> Node:
        is_negative = False
        while self.token in ("+", "-"):
            is_negative ^= self._next() == "-"
        product = self._product()
        return negative(product) if is_negative else product

    def _product(self) -> Node:
        factors = [self._power()]
        while True:
            if self.token in ("*", "/"):
                sign = self._next()
                minus = False
                while self.token in ("+", "-"):
                    minus ^= self._next() == "-"
                factor = self._power()
                factor = negative(factor) if minus else factor
                if sign == "*":
                    factors.append(factor)
                else:
                    factors = [divide(multiply(*factors), factor)]
            elif self.token == r"\over":
                self._next()
                return divide(multiply(*factors), self._product())
            elif self.token == r"\choose":
                self._next()
                return Operation("binom", (multiply(*factors), self._product()))
            elif self._begins_factor():
                if is_number(self.token) and is_number(self._ahead(-1)):
                    raise UnreadableError("two numbers side by side")
                factors.append(self._power())
            else:
                return multiply(*factors)

    def _begins_factor(self) -> bool:
        token = self.token
        if token is None or token in CLOSING:
            return False
        if token == "|":
            return not self._bars
        return (
            is_number(token)
            or token.isalpha()
            or token[0] in '"\\'
            or (token in OPENING and token != r"\{")
        ) and token not in (r"\over", r"\choose", r"\pm", r"\mp", "\\\\")

    def _power(self) -> Node:
        node = self._postfix(self._atom())
        if self.token == "^":
            self._next()
            node = Operation("^", (node, self._exponent()))
            if self.token == "!":
                node = self._postfix(node)
        return node

    def _exponent(self) -> Node:
        if self.token == "-":  # 10^-3, as programs write it
            self._next()
            return negative(self._exponent())
        return self._atom()

    def _postfix(self, node: Node) -> Node:
        if self.token == "!":
            self._next()
            node = Operation("!", (node,))
        if self.token in ("!", "'"):
            raise UnreadableError("a double factorial or a derivative")
        if self.token == "°":
            self._next()
            node = multiply(node, Operation("pi"), Number(Fraction(1, 180)))
        return node

    def _atom(self) -> Node:
        token = self._next()
        if is_number(token):
            return self._number(token)
        if token in _PAIRS:
            inside, bars = None, self._bars
            self._bars = 0
            inside = self.sum()
            self._bars = bars
            self._want(_PAIRS[token])
            kind = {r"\lfloor": "floor", r"\lceil": "ceil"}.get(token)
            return Operation(kind, (inside,)) if kind else inside
        if token == "|":
            self._bars += 1
            inside = self.sum()
            self._bars -= 1
            self._want("|")
            return Operation("abs", (inside,))
        if token in _CALLS:
            return self._call(_NAMED.get(token, token)[1:])
        if token == r"\frac":
            return divide(self._argument(), self._argument())
        if token in (r"\sqrt", '"sqrt'):
            return self._root()
        if token == r"\binom":
            return Operation("binom", (self._argument(), self._argument()))
        return self._symbol(token)

    def _number(self, token: str) -> Node:
        value = number(token)
        if token.isdigit() and not is_number(self._ahead(-2)):
            mixed = self._fraction_behind()
            if mixed is not None:
                return Number(value + mixed)
        return Number(value)

    def _fraction_behind(self) -> Fraction | None:
        r"""The proper fraction of whole numbers, `\frac{4}{5}` or `4/5`, that stands here."""
        for shape in _FRACTIONS:
            wanted = shape.split()
            found = self._tokens[self._place : self._place + len(wanted)]
            if len(found) < len(wanted) or not all(
                token.isdigit() if want == "#" else token == want
                for token, want in zip(found, wanted, strict=True)
            ):
                continue
            parts = [token for token, want in zip(found, wanted, strict=True) if want == "#"]
            if len(parts) == 1:
                if len(parts[0]) != 2:  # \frac12: the first two digits
                    continue
                parts = list(parts[0])
            above, below = (int(part) for part in parts)
            if 0 < above < below and max(map(len, parts)) <= MAX_DIGITS:
                self._place += len(wanted)
                return Fraction(above, below)
        return None

    def _argument(self) -> Node:
        r"""Of `\frac` and the like: a group, or one sign; of a number without braces one digit."""
        token = self.token
        if token is not None and is_number(token) and len(token) > 1 and token.isdigit():
            self._tokens[self._place] = token[1:]
            return Number(Fraction(int(token[0])))
        return self._atom()

    def _root(self) -> Node:
        if self.token == "[":
            self._next()
            degree = self.sum()
            self._want("]")
            return Operation("root", (self._atom(), degree))
        return Operation("root", (self._atom(), Number(Fraction(2))))

    def _call(self, name: str) -> Node:
        base = exponent = None
        if self.token == "_" and name == "log":
            self._next()
            base = self._argument()
        if self.token == "^":
            self._next()
            exponent = self._exponent()
        if exponent == MINUS_ONE and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise UnreadableError("nested too deeply")
        args = [self._power()]
        if self._ahead(-1) != ")":
            while self._begins_factor() and self.token not in _CALLS and self.token != "(":
                args.append(self._power())
        self._nesting -= 1
        operands = (multiply(*args),) if base is None else (multiply(*args), base)
        node: Node = Operation(name, operands)
        return node if exponent is None else Operation("^", (node, exponent))

    def _symbol(self, token: str) -> Node:
        if token in _CONSTANTS and self.token != "_":
            return Operation(_CONSTANTS[token])
        if token in _DECORATIONS:
            return Symbol(token + self._raw())
        if token == r"\infty":
            return Symbol(token)
        letter = token.isalpha() and token.isascii()
        if not (letter or token in _GREEK or (token[0] == '"' and token[1:].isalpha())):
            raise UnreadableError(f"found {token!r} in an expression")
        name = token.removeprefix('"')
        if self.token == "_":
            self._next()
            name += "_" + self._raw()
        while self.token == "'":
            name += self._next()
        return Symbol(name)

    def _raw(self) -> str:
        """One token or the tokens of a group, joined."""
        token = self._next()
        if token != "{":
            return token.removeprefix('"')
        name = ""
        while (token := self._next()) != "}":
            if token == "{":
                raise UnreadableError("braces in an index")
            name += token.removeprefix('"')
        return name
