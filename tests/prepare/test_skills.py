"""The ground truths again, from the text of the question alone."""

import random
import re
from fractions import Fraction

import pytest

from megatron_prime.prepare.skills import SKILLS, linear, modular
from megatron_prime.verify.math_answer import grade


def side(text):
    """(factor of x, constant) of `3x+5`."""
    factor = re.match(r"(-?\d+)x", text)
    rest = text[factor.end() :] if factor else text
    return int(factor.group(1)) if factor else 0, int(rest or 0)


def root(question):
    left, right = re.fullmatch(r"solve (.+)=(.+):", question).groups()
    (a, b), (c, d) = side(left), side(right)
    return Fraction(d - b, a - c)


def residue(question):
    terms, modulus = re.fullmatch(r"\((.+)\) mod (\d+)=", question).groups()
    total = 0
    for term in terms.split("+"):
        base, _, power = term.partition("^")
        total += int(base) ** int(power) if power else eval_product(term)
    return total % int(modulus)


def eval_product(term):
    result = 1
    for factor in term.split("*"):
        result *= int(factor)
    return result


@pytest.mark.parametrize(("skill", "solve"), [(linear, root), (modular, residue)])
@pytest.mark.parametrize("difficulty", [1, 2, 3, 5])
def test_the_truth_is_the_solution_and_a_careful_writer_finds_it(skill, solve, difficulty):
    rng = random.Random(difficulty)
    for _ in range(300):
        exercise = skill(rng, difficulty, 0.0)
        assert str(solve(exercise.question)) == exercise.ground_truth
        assert grade(exercise.worked, exercise.ground_truth) == 1.0


@pytest.mark.parametrize("skill", [linear, modular])
def test_a_sloppy_writer_is_often_wrong_and_ends_with_a_box(skill):
    rng = random.Random(0)
    made = [skill(rng, 2, 0.5) for _ in range(300)]
    assert all(re.search(r"\\boxed\{-?\d+\}$", exercise.worked) for exercise in made)
    right = sum(grade(exercise.worked, exercise.ground_truth) for exercise in made) / len(made)
    assert 0.1 < right < 0.7


def test_difficulty_makes_questions_longer():
    for skill in SKILLS.values():
        lengths = []
        for difficulty in (1, 2, 4):
            rng = random.Random(0)
            made = [skill(rng, difficulty, 0.0).question for _ in range(100)]
            lengths.append(sum(map(len, made)))
        assert lengths == sorted(set(lengths))


def test_the_generator_decides_everything():
    for skill in SKILLS.values():
        one, other, third = (skill(random.Random(seed), 3, 0.5) for seed in (5, 5, 6))
        assert one == other
        assert one != third


def test_easy_equations_have_small_positive_numbers():
    rng = random.Random(0)
    for _ in range(200):
        question = linear(rng, 1, 0.0).question
        assert re.fullmatch(r"solve \d+x\+\d+=\d+:", question)
