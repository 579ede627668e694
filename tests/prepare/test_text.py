import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prime.prepare.text import digest, normal_form, numbers, shorten, words

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $x$?", "what is x ?"),
        (r"\left( \dfrac{1}{2} \right)", r"(\frac{1}{2})"),
        (r"1\,234", "1 234"),
        ("ﬁnd  x", "find\nx"),
        (r"\textbf{Find} $\,x$", "{find} x"),
        (r"\[x^2\]", "$x^2$"),
    ],
)
def test_what_changes_the_look_alone_is_forgotten(one, other):
    assert normal_form(one) == normal_form(other)


@pytest.mark.parametrize(
    ("one", "other"), [("3-5", "3+5"), ("x^2", "x^3"), ("x_1", "x^1"), ("(1,2)", "[1,2]")]
)
def test_what_changes_the_problem_is_not(one, other):
    assert normal_form(one) != normal_form(other)


def test_words_are_letters_and_digits_without_layout():
    text = r"Find $\left\lfloor\dfrac{12}{x_1}\right\rfloor$, i.e.\ \textbf{its} floor!"
    assert " ".join(words(text)) == "find lfloor frac 12 x 1 rfloor i e its floor"
    assert words("\\leftarrow") == ["leftarrow"]


def test_numbers_stand_in_their_order():
    assert numbers("From 10 to 2.5, step 3") == ["10", "2.5", "3"]


def test_a_key_is_the_same_in_another_process():
    program = "from megatron_prime.prepare.text import digest; print(digest('ein Text ∑'))"
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(out.stdout) == digest("ein Text ∑")
    assert digest("ein Text ∑") != digest("ein Text")
    assert digest("lone \ud83d surrogate") < 2**64


def test_shortened_texts_are_one_line_with_a_limit():
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 50, 10) == "x" * 9 + "…"
