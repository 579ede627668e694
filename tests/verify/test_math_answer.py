import json
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_prime.verify.math_answer import MAX_ANSWER_LENGTH, boxed_answer, grade

MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.jsonl"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1}", "1"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} and so on {}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and, cut off, \boxed{\frac{5", "4"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"{ never closed \boxed{7}", "7"),
        (r"stray } \boxed{8}", "8"),
        (r"x &= 9 \\\boxed{9}", "9"),
        (r"\\boxed{10}", "10"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"\boxed {11}", "11"),
        (r"\boxed{ }", ""),
        (r"\boxed{12} \boxed{}", ""),
        (r"\boxed 13", None),
        ("the answer is 14", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_counts(response, answer):
    assert boxed_answer(response) == answer


def test_nothing_but_opening_boxes_takes_one_pass():
    started = time.perf_counter()
    assert boxed_answer(r"\boxed{" * 100_000) is None
    assert boxed_answer(r"\boxed{" * 100_000 + "}" * 100_000) == ""
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("35", "35", 1.0),
        ("35", " 35 ", 1.0),
        ("035", "35", 1.0),
        ("+35", "35", 1.0),
        ("-35", "35", 0.0),
        ("1,234,567", "1234567", 1.0),
        ("1,2345", "12345", 0.0),
        ("36", "35", 0.0),
        ("100000000000000000000001", "100000000000000000000000", 0.0),
        ("", "35", 0.0),
        ("", "", 0.0),
        (r"\frac12", "0.5", 1.0),
        (r"\frac{1}{2}", r"\frac{2}{4}", 1.0),
        (r"\frac{1}{2}", r"\frac{1}{3}", 0.0),
        ("x=5", "5", 1.0),
        (r"(x+1)^2", "x^2+2x+1", 1.0),
        (r"(x+1)^2", "x^2+2x+2", 0.0),
        (r"\{2,1\}", r"\{1,2\}", 1.0),
        ("(1,2)", "(2,1)", 0.0),
        ("[0,1]", "[0,1)", 0.0),
        (r"\text{east}", "east", 1.0),
        ("3 or 4", "4", 0.0),
        ("50", r"50\%", 0.0),
        (r"__import__('os').abort()", "5", 0.0),
        (r"\frac{{{", "5", 0.0),
    ],
)
def test_grades(answer, truth, reward):
    assert grade(rf"so it is \boxed{{{answer}}}.", truth) == reward


def test_no_box_scores_nothing_even_where_the_answer_stands():
    assert grade("35", "35") == 0.0


def test_the_answer_may_not_be_longer_than_the_limit():
    longest = "7" * MAX_ANSWER_LENGTH
    assert grade(rf"\boxed{{{longest}}}", longest) == 1.0
    assert grade(rf"\boxed{{{longest}7}}", longest + "7") == 0.0


def test_reference_solutions_of_a_benchmark_are_right_and_others_wrong():
    if not MATH500.exists():
        pytest.skip(f"no {MATH500}")
    rows = [json.loads(line) for line in MATH500.read_text().splitlines()][::8]
    wrong = [row["id"] for row in rows if grade(row["solution"], row["answer"]) != 1.0]
    assert not wrong
    numbers = [row for row in rows if re.fullmatch("[0-9]+", row["answer"])]
    assert len(numbers) > 20
    for row, other in pairwise(numbers):
        assert grade(other["solution"], row["answer"]) == float(row["answer"] == other["answer"])
