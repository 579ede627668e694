"""What is printed beside the paper's rows."""

from __future__ import annotations

import pytest

from megatron_prime.benchmarks.paper import SETS
from megatron_prime.benchmarks.summary import as_json, as_markdown, result_of
from megatron_prime.known_sets import KNOWN_SETS

ABOUT = {"policy": "some/model", "temperature": 0.3}


@pytest.fixture
def greedy(make_record):
    """A result of so many problems, the first ones right."""

    def make(problems, right):
        records = [make_record([float(i < right)], name=f"p{i}") for i in range(problems)]
        return result_of(records, "greedy", "math", 0)

    return make


def own_row(text):
    return next(line for line in text.splitlines() if line.startswith("| **this model** |"))


def test_a_result_by_hand(make_record):
    records = [
        make_record([1.0, 0.0], ["4", "5"], lengths=[2, 4]),
        make_record([0.0, 0.0], ["5", "5"], lengths=[8, 2], name="p1", reason="length"),
    ]
    found = result_of(records, "sampled", "math", 0)
    assert (found.problems, found.responses, found.tokens_mean) == (2, 4, 4.0)
    assert found.truncation_rate == 0.5
    assert {name: figure.value for name, figure in found.figures.items()} == {
        "avg@2": 0.25,
        "pass@2": 0.5,
        "maj@2": 0.5,
    }


def test_all_seven_sets_have_an_average(greedy):
    results = {n: {"greedy": greedy(KNOWN_SETS[n].problems, 12)} for n in SETS}
    shares = [f"{1200 / KNOWN_SETS[name].problems:.1f}" for name in SETS]
    mean = sum(1200 / KNOWN_SETS[name].problems for name in SETS) / 7
    row = own_row(as_markdown(results, ABOUT))
    assert row == f"| **this model** | — | {' | '.join(shares)} | {mean:.1f} |"


def test_the_average_over_a_set_that_is_not_the_papers_is_starred(greedy):
    counts = {name: KNOWN_SETS[name].problems for name in SETS} | {"minerva": 20}
    results = {name: {"greedy": greedy(count, 12)} for name, count in counts.items()}
    shares = [f"{1200 / counts[n]:.1f}" + "\\*" * (n == "minerva") for n in SETS]
    mean = sum(1200 / count for count in counts.values()) / 7
    text = as_markdown(results, ABOUT)
    assert own_row(text) == f"| **this model** | — | {' | '.join(shares)} | {mean:.1f}\\* |"
    assert text.count("Minerva Math (\\*): 20 problems here, 272 in the paper.") == 1


def test_a_set_that_is_missing_has_no_number_and_there_is_no_average(greedy):
    results = {"aime2024": {"greedy": greedy(30, 6)}, "amc": {"greedy": greedy(40, 10)}}
    text = as_markdown(results, ABOUT)
    assert own_row(text) == "| **this model** | — | 20.0 | 25.0\\* | — | — | — | — | — | — |"
    assert "AMC (\\*): 40 problems here, 83 in the paper." in text


def test_the_row_that_does_not_add_up_is_marked(greedy):
    results = {"amc": {"greedy": greedy(83, 1)}}
    text = as_markdown(results, ABOUT)
    (row,) = [line for line in text.splitlines() if line.startswith("| RLOO w/ OV only | 240")]
    assert row.endswith("| 36.9 † (38.14) |")
    assert "RLOO w/ OV only, step 240 (†): the paper prints 36.9, its cells give 38.14." in text
    marked = as_json(results, ABOUT)["paper_rows_whose_average_does_not_add_up"]
    assert [(row["method"], row["printed"]) for row in marked] == [
        ("RLOO w/ OV only", 36.9),
        ("PRIME", 43.9),
        ("RLOO", 36.9),
    ]


def test_the_mean_of_sixteen_stands_beside_the_papers(make_record):
    records = [make_record([1.0] * 4 + [0.0] * 12, ["4"] * 16)]
    text = as_markdown({"amc": {"sampled": result_of(records, "sampled", "math", 0)}}, ABOUT)
    assert "| **this model** | — | — | 25.0\\* |" in text
    assert "AMC (\\*): 1 problems here, 83 in the paper." in text
    whole = [make_record([1.0] * 4 + [0.0] * 12, ["4"] * 16, name=f"p{i}") for i in range(83)]
    text = as_markdown({"amc": {"sampled": result_of(whole, "sampled", "math", 0)}}, ABOUT)
    assert "| **this model** | — | — | 25.0 |" in text
    assert "(\\*)" not in text
    assert "| PRIME | 592 | 24.2 | 54.5 |" in text
