"""The expected outputs again: by the question's sentences, and by running the worked program."""

import json
import random
import re
import subprocess
import sys

import pytest

from megatron_prime.prepare.programs import program
from megatron_prime.prepare.rules import screen


def follow(question, line):
    """Do what the question says, sentence by sentence."""
    told, printed = re.fullmatch(
        r"The input is one line of integers with spaces between them\. First (.+)\. Print (.+)\.\n",
        question,
    ).groups()
    row = list(map(int, line.split()))
    for sentence in told.split("; then "):
        k = int((re.findall(r"\d+", sentence) or [0])[0])
        kind = re.sub(r"\d+", "k", sentence)
        if kind == "keep only the multiples of k":
            row = list(filter(lambda v: not v % k, row))
        elif kind == "remove all numbers greater than k":
            row = list(filter(lambda v: not v > k, row))
        elif kind == "add k to each number":
            row = list(map(k.__add__, row))
        elif kind == "multiply each number by k":
            row = list(map(k.__mul__, row))
        elif kind == "keep every second number, beginning with the first":
            row = [v for i, v in enumerate(row) if i % 2 == 0]
        elif kind == "reverse the order":
            row = list(reversed(row))
        else:
            assert kind == "replace each number by the sum of all up to and including it"
            total = 0
            for i, v in enumerate(row):
                total += v
                row[i] = total
    return {
        "the sum": lambda: str(sum(row)),
        "how many numbers are left": lambda: str(len(row)),
        "the largest number, or 0 if there is none": lambda: str(sorted(row)[-1] if row else 0),
        "the numbers, with a space between them": lambda: " ".join(f"{v}" for v in row),
    }[printed]()


@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_the_tests_follow_from_the_question(difficulty, make_item):
    rng = random.Random(difficulty)
    told = set()
    for _ in range(100):
        question, truth, _ = program(rng, difficulty, 0.5)
        tests = json.loads(truth)
        assert len(tests["inputs"]) == len(tests["outputs"]) == 8
        for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True):
            assert follow(question, given) == wanted.rstrip("\n")
        assert question.count("; then ") == difficulty - 1
        item = make_item(question, truth, ability="code")
        assert screen(item, drop_yes_no=True) is item
        told.add(question)
    assert len(told) > 50


def test_the_worked_program_passes_and_a_sloppy_one_leaves_lines_out():
    rng = random.Random(9)
    for _ in range(3):
        question, truth, worked = program(rng, 3, 0.0)
        code = re.fullmatch(r"```python\n(.+)\n```", worked, re.DOTALL).group(1)
        tests = json.loads(truth)
        for given, wanted in list(zip(tests["inputs"], tests["outputs"], strict=True))[:2]:
            ran = subprocess.run(
                [sys.executable, "-I", "-S", "-c", code],
                input=given,
                capture_output=True,
                text=True,
                check=True,
            )
            assert ran.stdout == wanted, question
    lines = [program(rng, 4, 0.5)[2].count("\n") for _ in range(200)]
    assert abs(sum(lines) / 200 - (3 + 4 * 0.5)) < 0.4
    assert all(program(rng, 4, 0.0)[2].count("\n") == 3 + 4 for _ in range(20))
