"""When are two quantities equal? Numbers with units, numerals in a base, ratios, times of day.

A gold without a unit takes any unit, and a gold number without a base the same digits in any base:
the question named them. Between two units, the dimension must agree and the amounts are converted.
"""

from __future__ import annotations

from fractions import Fraction

from megatron_prime.verify.math_exact import TooLargeError, exact
from megatron_prime.verify.math_library import equivalent
from megatron_prime.verify.math_notation import UnreadableError
from megatron_prime.verify.math_numbers import real_value, same
from megatron_prime.verify.math_tree import Node, Number, Operation, Symbol, multiply
from megatron_prime.verify.math_types import Numeral, Ratio, Residue, Scalar, Time, Unread, Value
from megatron_prime.verify.math_units import DEGREE, Unit


def same_scalars(gold: Scalar | Unread, answer: Scalar | Unread) -> bool:
    """Two expressions, perhaps with units."""
    if isinstance(gold, Unread) or isinstance(answer, Unread):
        if gold.tokens == answer.tokens:
            return True
        if _too_large(gold) or _too_large(answer):
            return False
        return equivalent(gold.tokens, answer.tokens)
    if gold.is_percent != answer.is_percent and gold.unit is None and answer.unit is None:
        # The question says that it wants per cent: 20 is 20 %, and so is 0.2.
        scale = Fraction(1, 100) if gold.is_percent else Fraction(100)
        if _same_number(gold.node, multiply(answer.node, Number(scale)), gold.rounding):
            return True
    if gold.unit is not None and answer.unit is None:
        answer = _with_letter(answer, gold.unit)
    if gold.unit is None or answer.unit is None:
        if _same_number(gold.node, answer.node, gold.rounding):
            return True
        if gold.unit is None and answer.unit is None:
            return False
        radians = multiply(Operation("pi"), Number(Fraction(1, 180)))
        golden, given = (
            multiply(one.node, radians) if _in_degrees(one.unit) else one.node
            for one in (gold, answer)
        )
        return (_in_degrees(gold.unit) or _in_degrees(answer.unit)) and same(golden, given)
    if gold.unit.powers != answer.unit.powers:
        return False
    scale = answer.unit.factor / gold.unit.factor
    return _same_number(gold.node, multiply(answer.node, Number(scale)), gold.rounding)


def _too_large(value: Scalar | Unread) -> bool:
    """Whether the library should be spared this number."""
    if isinstance(value, Unread):
        return value.too_large
    try:
        real_value(value.node)
    except TooLargeError:
        return True
    except UnreadableError:  # with variables, or not real
        pass
    return False


def _in_degrees(unit: Unit | None) -> bool:
    return unit is not None and unit.powers == ((DEGREE, 1),)


def _with_letter(answer: Scalar, unit: Unit) -> Scalar:
    """`5 m` is five times m, but five metres where metres are wanted."""
    for letter, base in (("m", "m"), ("g", "g"), ("s", "s")):
        node = answer.node
        if unit.powers != ((base, 1),) or not isinstance(node, Operation) or node.name != "*":
            continue
        if node.args[-1] == Symbol(letter):
            measured = multiply(*node.args[:-1])
            return Scalar(measured, Unit(Fraction(1), unit.powers), None, answer.tokens)
    return answer


def _same_number(gold: Node, answer: Node, rounding: Fraction | None) -> bool:
    if rounding is None:
        return same(gold, answer)
    golden = exact(gold)
    if golden is not None and abs(golden) < 200 * rounding and exact(answer) is None:
        return False  # two digits: too many roots and multiples of pi come that near
    try:
        distance = abs(real_value(gold) - real_value(answer))
    except UnreadableError:
        return False
    return bool(distance <= real_value(Number(rounding)) * (1 + Fraction(1, 10**12)))


def same_numerals(gold: Value, answer: Value) -> bool:
    """A numeral in a base against another, or against a plain number."""
    if isinstance(gold, Numeral) and isinstance(answer, Numeral):
        return gold.value == answer.value
    if isinstance(gold, Numeral):
        return isinstance(answer, Scalar) and same(Number(gold.value), answer.node)
    if not isinstance(gold, Scalar) or not isinstance(answer, Numeral):
        return False
    # The question named the base, and the gold leaves it out.
    return answer.digits.isdigit() and Number(Fraction(int(answer.digits))) == gold.node


def same_residues(gold: Value, answer: Value) -> bool:
    """Two numbers modulo the same; the modulus of one may be left to the question."""
    if isinstance(gold, Residue) and isinstance(answer, Residue):
        numbers = (gold.value.node, answer.value.node, gold.modulus, answer.modulus)
        first, second, modulus, other = map(exact, numbers)
        if first is None or second is None or not modulus or modulus != other:
            return False
        return (first - second) % modulus == 0
    golden, given = (one.value if isinstance(one, Residue) else one for one in (gold, answer))
    if not isinstance(golden, Scalar) or not isinstance(given, Scalar):
        return False
    if isinstance(answer, Residue):
        rest, modulus = exact(answer.value.node), exact(answer.modulus)
        if rest is None or modulus is None or not 0 <= rest < modulus:  # 5 mod 3 is no 5
            return False
    return same_scalars(golden, given)


def same_ratios(gold: Value, answer: Value) -> bool:
    """Two ratios or times of day, of which one may be a fraction."""
    if isinstance(gold, Time) and isinstance(answer, Time):
        if gold.half and answer.half:
            return (gold.hour, gold.minute, gold.half) == (answer.hour, answer.minute, answer.half)
        hours = (
            {_hour(gold), _hour(answer)} if gold.half or answer.half else {gold.hour, answer.hour}
        )
        same_clock = len(hours) == 1 or gold.hour == answer.hour
        return same_clock and gold.minute == answer.minute
    if isinstance(gold, Time):
        return False
    one, other = _parts(gold), _parts(answer)
    if one is None or other is None or len(one) != len(other):
        return False
    return all(
        same(multiply(a, other[0]), multiply(b, one[0])) for a, b in zip(one, other, strict=True)
    )


def _hour(time: Time) -> int:
    return time.hour % 12 + 12 * (time.half == "pm") if time.half else time.hour


def _parts(value: Value) -> tuple[Node, ...] | None:
    if isinstance(value, Ratio):
        return value.parts
    if isinstance(value, Time) and not value.half:
        return Number(Fraction(value.hour)), Number(Fraction(value.minute))
    if isinstance(value, Scalar) and value.unit is None:
        return value.node, Number(Fraction(1))
    return None
