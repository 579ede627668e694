import pytest

from megatron_prime.verify.math_library import equivalent
from megatron_prime.verify.math_notation import tokenize


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("55", r"\sum_{k=1}^{10} k", True),
        ("54", r"\sum_{k=1}^{10} k", False),
        (r"\int_0^1 x^2\,dx", r"\frac{1}{3}", True),
        (r"\int_0^1 x^2\,dx", "0.3333333333", False),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2", True),
        (r"\max(3,5)", "5", True),
        ("2.71", r"3.14 \prod 2.71", False),  # nothing is picked out of what can't be read
        ("3.14", r"\lfloor 3.14 \int", False),
    ],
)
def test_what_the_library_is_for(gold, answer, equal):
    assert equivalent(tokenize(gold), tokenize(answer)) is equal


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "5",
            "x+",
            r"\int 5 \text{ import os }",
            r"\int \# 5",
            r"\int (x+y)^{5000}",
            r"\sum" * 300,
        ),
        r"\sum_{i=1}^{9} 9^{9^{9}}",
    ],
)
def test_what_is_not_left_to_it(answer, monkeypatch):
    import math_verify

    monkeypatch.setattr(math_verify, "parse", lambda *args, **more: pytest.fail("it was asked"))
    assert not equivalent(tokenize("5"), tokenize(answer))
