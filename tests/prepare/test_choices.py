from dataclasses import replace

import pytest

from megatron_prime.data.chat import Message
from megatron_prime.prepare.choices import find_options, is_formula, open_question
from megatron_prime.prepare.items import Dropped

PLAIN = "What is the sum of 2 and 3? (A) 4 (B) 5 (C) 6"
AMC = (
    r"What is the value of $2^3$? $\textbf{(A)}\ 6\qquad\textbf{(B)}\ 7\qquad\textbf{(C)}\ 8"
    r"\qquad\textbf{(D)}\ \frac{9}{2}\qquad\textbf{(E)}\ 10$"
)
LINES = "Compute the perimeter.\nA. $4$\nB. $2\\sqrt{5}$\nC. $6$\nD. $8$"


@pytest.mark.parametrize(
    ("text", "truth", "stem", "value"),
    [
        (PLAIN, "B", "What is the sum of 2 and 3?", "5"),
        (PLAIN, "(C) 6", "What is the sum of 2 and 3?", "6"),
        (PLAIN, "6", "What is the sum of 2 and 3?", "6"),
        (AMC, r"\textbf{(C)}\ 8", "What is the value of $2^3$?", "8"),
        (AMC, r"\text{D}", "What is the value of $2^3$?", r"\frac{9}{2}"),
        (AMC, "E", "What is the value of $2^3$?", "10"),
        (LINES, "B", "Compute the perimeter.", r"2\sqrt{5}"),
        (LINES, "$2\\sqrt{5}$", "Compute the perimeter.", r"2\sqrt{5}"),
        ("Find $x$ if $x+1=3$. A: 1  B: 2  C: 3", "B", "Find $x$ if $x+1=3$.", "2"),
        ("Find $x$ if $x+1=3$. A．1  B．2  C．3", "B", "Find $x$ if $x+1=3$.", "2"),
    ],
)
def test_choices_become_open_questions(make_item, text, truth, stem, value):
    found = open_question(make_item(text, truth))
    assert (found.text, found.ground_truth, found.reworked) == (stem, value, "choice_to_open")
    assert found.messages[-1].content == stem


@pytest.mark.parametrize(
    ("text", "truth", "why"),
    [
        ("Which of the following is 5? (A) 2+2 (B) 2+3 (C) 2+4", "B", "'Which'"),
        ("What could be the value of x? (A) 1 (B) 2 (C) 3", "B", "'could be'"),
        ("Judge the statements given here. (A) 1 (B) 2 (C) 3", "B", "'statements'"),
        ("What colour is the sky today? (A) red (B) blue (C) green", "B", "no number or formula"),
        ("How many points are there? (A) 1 (B) 2 (C) none of these", "C", "no number or formula"),
        (PLAIN, "D", "in none of"),
        (PLAIN, "7", "in none of"),
        ("2+3? (A) 4 (B) 5 (C) 6", "B", "too little is left"),
        ("What is the sum of 2 and 3? (A) 5 (B) 5 (C) 6", "B", "no number or formula"),
        ("What is the sum of 2 and 3?", "B", "the letter B of no options"),
    ],
)
def test_choices_that_no_rule_opens_are_dropped(make_item, text, truth, why):
    found = open_question(make_item(text, truth))
    assert isinstance(found, Dropped)
    assert found.rule == "choice"
    assert why in found.why


@pytest.mark.parametrize(
    "text",
    [
        "Points $A(1,2)$, $B(3,4)$ and $C(5,6)$ are given. Find the area.",
        "Let (A) be 5 and (B) be 6. Add them.",  # no (C)
        "In triangle $ABC$, find $\\angle A$.",
        "Let A, B, C be sets. How many subsets are there?",
    ],
)
def test_questions_without_options_stay(make_item, text):
    item = make_item(text, "5")
    assert open_question(item) is item


def test_the_solution_must_box_the_same_letter_and_a_value_is_left_to_the_grader(make_item):
    good = open_question(make_item(PLAIN, "B", solution=r"So \boxed{\textbf{(B) }5}."))
    assert (good.ground_truth, good.solution) == ("5", None)
    wrong = open_question(make_item(PLAIN, "B", solution=r"So $\boxed{C}$."))
    assert wrong.rule == "unmatched"
    value = open_question(make_item(PLAIN, "B", solution=r"So $\boxed{5}$."))
    assert value.solution == r"So $\boxed{5}$."


def test_the_rest_of_the_message_stays_and_an_unclear_place_is_refused(make_item):
    item = make_item(PLAIN, "B")
    around = replace(item, messages=(Message("user", f"Please: {PLAIN}\n\nBox it."),))
    content = open_question(around).messages[0].content
    assert content == "Please: What is the sum of 2 and 3?\n\nBox it."
    for contents in ((PLAIN, PLAIN), ("something else",)):
        unclear = replace(item, messages=tuple(Message("user", text) for text in contents))
        assert open_question(unclear).rule == "choice"


def test_the_last_run_of_options_counts():
    stem, values = find_options("Of (A), (B), (C) take two. How many? (A) 1 (B) 2 (C) 3 (D) 4")
    assert stem == "Of (A), (B), (C) take two. How many?"
    assert values == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("value", "formula"),
    [
        ("12", True),
        (r"\frac{3}{4}\sqrt{2}", True),
        ("2x+1", True),
        ("(-1, 2)", True),
        ("", False),
        (r"\frac{3}{4", False),
        (r"12\text{ or }13", False),
        ("none of these", False),
        ("?", False),
    ],
)
def test_what_a_verifier_can_compare(value, formula):
    assert is_formula(value) == formula
