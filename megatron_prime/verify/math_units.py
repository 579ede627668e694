r"""Units behind an answer: `5\text{ cm}`, `15\text{ cm}^2`, `60\text{ miles per hour}`, `\$5`.

A unit is a product of powers of base units and a factor, so that 5 m and 500 cm agree and cm and
cm^2 do not. Words that are in no table are units of their own kind: apples are no oranges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_prime.verify.math_notation import FUNCTIONS, Tokens, words

DEGREE = "degree"
_CURRENCIES = {r"\$": "dollar", "$": "dollar", "€": "euro", r"\pounds": "pound", "£": "pound"}

# name: (base unit, power, factor); spelled once, plurals are read off
_TABLE: dict[str, tuple[str, int, Fraction]] = {}


def _define(base: str, power: int = 1, **factors: str) -> None:
    for names, factor in factors.items():
        for name in names.split("__"):
            _TABLE[name] = (base, power, Fraction(factor))


_define(
    "m", m__meter__metre="1", km__kilometer__kilometre="1000", cm__centimeter__centimetre="1/100"
)
_define("m", mm__millimeter__millimetre="1/1000", inch__in="0.0254", ft__foot__feet="0.3048")
_define("m", yd__yard="0.9144", mi__mile="1609.344", dm__decimeter="1/10")
_define("g", g__gram="1", kg__kilogram="1000", mg__milligram="1/1000", lb__pound="453.59237")
_define("g", oz__ounce="28.349523125", tonne="1000000")
_define("s", s__sec__second="1", min__minute="60", h__hr__hour="3600", day="86400", week="604800")
_define("month", month="1", year__yr="12")
_define("m", 3, l__liter__litre="1/1000", ml__milliliter__millilitre="1/1000000")
_define("dollar", dollar__usd__buck="1", cent="1/100", penny="1/100")
_define(DEGREE, degree__deg="1")
_define("item", dozen="12")

_FUNCTIONS = frozenset(f"\\{name}" for name in FUNCTIONS)
_IGNORED = words("unit the of a an in linear")
_FORBIDDEN = words(
    "or and not is are if unless except when where wrong than to but for no false maybe instead too"
    " plus minus over negative one two three four five six seven eight nine ten eleven twelve half"
    " halves third thirds tenth tenths hundredth hundredths thousandth thousandths twelfth twelfths"
    " hundred thousand million billion trillion factorial inverse root log ln exp sin cos tan mod"
    " choose pi e i x y z n"
)
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SQUARES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS = {"squared": 2, "cubed": 3}
_PLURALS = {"feet": "ft", "inches": "inch", "pennies": "penny", "people": "person"}
MAX_WORDS = 4


@dataclass(frozen=True, slots=True)
class Unit:
    """A factor times powers of base units."""

    factor: Fraction
    powers: tuple[tuple[str, int], ...]


def split_unit(tokens: Tokens) -> tuple[Tokens, Unit | None, bool]:
    """What is measured, the unit (None without one), and whether it is in per cent."""
    sign = tokens[:1] if tokens[:1] == ("-",) else ()
    if len(tokens) > 1 + len(sign) and tokens[len(sign)] in _CURRENCIES:
        currency = Unit(Fraction(1), ((_CURRENCIES[tokens[len(sign)]], 1),))
        rest, behind, _ = split_unit(sign + tokens[len(sign) + 1 :])
        return rest, currency if behind is None else behind, False
    if len(tokens) > 1 and tokens[-1] in ("%", '"percent', '"per cent', '"pct', '"percentage'):
        return tokens[:-1], None, True
    start = len(tokens)
    while start > 0 and _belongs(tokens, start - 1):
        start -= 1
    while start < len(tokens) and not (tokens[start][0] == '"' or tokens[start] == "°"):
        start += 1
    if start in (0, len(tokens)) or (tokens[start] == "°" and _FUNCTIONS.intersection(tokens)):
        return tokens, None, False  # the sine of 30° is no angle
    unit = _unit(tokens[start:])
    if unit is None:
        return tokens, None, False
    return tokens[:start], unit if unit.powers else None, False


def _belongs(tokens: Tokens, place: int) -> bool:
    token = tokens[place]
    if token[0] == '"' or token in ("°", "/", "*", "{", "}"):
        return True
    behind_power = tokens[place - 1] in ("^", "{", "-") and place > 1
    return token == "^" or token == "-" or (token.isdigit() and behind_power)


def _unit(tokens: Tokens) -> Unit | None:
    """The unit of these tokens, without powers if it says nothing (`units`); None if it is none."""
    text = " ".join(" degree " if token == "°" else token.removeprefix('"') for token in tokens)
    text = re.sub(r"[{}]", "", text).replace("^ ", "^").replace(" ^", "^").replace("*", " ")
    text = text.replace("- ", "-")
    text = re.sub(r"\bper\b", "/", text).replace("/", " / ")
    powers: dict[str, int] = {}
    factor, side, pending = Fraction(1), 1, 1
    found = text.split()
    if len(found) > 2 * MAX_WORDS:
        return None
    for word in found:
        match = re.fullmatch(r"([A-Za-z.'-]+?)\.?(?:\^(-?\d))?", word)
        if word == "/":
            side = -1
        elif match is None or match[1].lower() in _FORBIDDEN:
            return None
        elif match[1].lower() in _SQUARES:
            pending = _SQUARES[match[1].lower()]
        elif match[1].lower() in _POWERS:
            if not powers:
                return None
            last = next(reversed(powers))
            powers[last] *= _POWERS[match[1].lower()]
        else:
            name = _singular(match[1])
            exponent = side * pending * int(match[2] or 1)
            base, power, scale = _TABLE.get(name, (name, 1, Fraction(1)))
            if base not in _IGNORED:
                powers[base] = powers.get(base, 0) + power * exponent
                factor *= scale**exponent
            pending = 1
    if "mph" in powers:
        powers = {"m": powers["mph"], "s": -powers.pop("mph")}
        factor *= Fraction("0.44704")
    return Unit(factor, tuple(sorted(powers.items())))


def _singular(word: str) -> str:
    if word in _TABLE:
        return word
    word = word.lower()
    word = _PLURALS.get(word, word)
    if word not in _TABLE and len(word) > 2 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word
