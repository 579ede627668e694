import time

import pytest

from megatron_prime.verify.outputs import read_value, same_text, same_value

LONG = "9" * 10_000


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("1 2 3\n", "1 2 3"),
        ("1\n2\n\n3   \n", "1 2 3"),
        ("", "\n"),
        ("YES", "YES"),
        ("007 -0 +5", "7 0 5"),
        ("0.3333333", "0.33333333333"),
        ("1e-3 .5 2.", "0.001 0.50 2.0"),
        ("3.0 2.9999999999", "3 3"),
        ("1e18 1000000000000000007.0", "1000000000000000000 1000000000000000007"),
        ("1e-9999", "0"),
        ("100000.5", "100000.9"),  # relative 4e-6: NumPy's allclose, as in the released code
        (LONG, "+" + LONG),
        ("inf nan", "inf nan"),
    ],
)
def test_equal_text(found, expected):
    assert same_text(found, expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("1 3 2", "1 2 3"),  # the released code compares sets in the end
        ("1 2 2", "1 2"),
        ("1 2", "1 2 2"),
        ("1 2", ""),
        ("12", "1 2"),
        ("yes", "YES"),
        ("1000000008", "1000000007"),  # within the released code's tolerance
        ("1000000008.0", "1000000007"),
        ("3.001", "3"),
        ("0.334", "0.3333"),
        ("1.00002", "1.0"),
        ("5.0", "five"),
        ("1e18", "1000000000000000007"),  # two floats are further apart
        ("1000000000000000001.0", "1000000000000000000"),
        ("1e9999", "9" * 400),
        ("nan", "1.5"),
        ("1_000", "1000"),
        ("0x10", "16"),
        ("1e999999", "1.5"),
        (LONG, "8" + LONG[1:]),
        ("", "x"),
    ],
)
def test_other_text(found, expected):
    assert not same_text(found, expected)


def test_long_garbage_costs_nothing():
    started = time.monotonic()
    for digits in ("1" * 65_000, "." + "1" * 65_000, "1." + "1" * 65_000, "1e" + "1" * 65_000):
        for expected in ("7", "7.5", LONG):
            assert not same_text(digits + "x", expected)
            assert not same_text(digits, expected)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("5", "5"),
        ("5.0", "5"),
        ("5", "5.0"),
        ("true", "true"),
        ("1", "true"),  # as in Python
        ("null", "null"),
        ('"a b"', '"a b"'),
        ("[1, [2, 3]]", "[1, [2, 3]]"),
        ('{"a": [1], "b": 2}', '{"b": 2, "a": [1]}'),
        ("0.30000000000000004", "0.3"),
        ("[0.33333333, 1]", "[0.3333333, 1.0]"),
        (LONG, LONG),
    ],
)
def test_equal_values(found, expected):
    assert same_value(read_value(found), read_value(expected))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ('"5"', "5"),
        ("5", '"5"'),
        ("5.0000001", "5"),
        ("0.31", "0.3"),
        ("[2, 1]", "[1, 2]"),
        ("[1, 2, 3]", "[1, 2]"),
        ("[1, 2]", "[1, 2, 3]"),
        ("[1]", "1"),
        ("1", "[1]"),
        ('{"a": 1}', '{"a": 2}'),
        ('{"a": 1, "b": 2}', '{"a": 1}'),
        ("[]", "{}"),
        ("null", "false"),
        ("null", "0"),
        ('"A"', '"a"'),
        ('"a "', '"a"'),
        ("NaN", "NaN"),
        ("NaN", "0.5"),
        ("Infinity", "0.5"),
        ("1" + "0" * 400, "0.5"),
        (LONG, "8" + LONG[1:]),
        (LONG, "0.5"),
    ],
)
def test_other_values(found, expected):
    assert not same_value(read_value(found), read_value(expected))


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "{'a': 1}", "1 2", b"\xff\xfe\xff"])
def test_what_is_no_value_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's own messages
        read_value(text)
