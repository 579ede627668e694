"""Metrics against enumeration, hand counts and the binomial distribution."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_prime.benchmarks import metrics


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for right in range(n + 1):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert metrics.pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_lose_itself_in_rounding():
    """The product form of the paper, 1 - prod (1 - k / i) over i = n - c + 1 … n."""
    for n, right, k in ((1000, 1, 500), (1000, 900, 100), (200, 3, 10)):
        product = np.prod(1.0 - k / np.arange(n - right + 1, n + 1)) if n - right >= k else 0.0
        assert metrics.pass_at_k(n, right, k) == pytest.approx(1.0 - product, rel=1e-12)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["4", "5", "5"], 1),
        (["4", "5", "5", "4"], 0),  # a tie: the answer that came first
        ([None, "5", None, None], 1),  # no answer is no vote
        ([None, "7", "5", "5", "7"], 1),
        ([None, None], None),
    ],
)
def test_the_majority_is_the_first_sample_of_the_most_frequent_answer(answers, winner):
    assert metrics.majority(answers) == winner


def test_sizes_are_powers_of_two_and_all():
    assert metrics.sizes(1) == [1]
    assert metrics.sizes(4) == [1, 2, 4]
    assert metrics.sizes(6) == [1, 2, 4, 6]


def test_a_problem_by_hand(make_record, make_scores):
    scores = make_scores((-3.0, 1.0, 0.5), (-1.0, 0.0, 0.2), (-2.0, 4.0, 0.5), (-9.0, 5.0, -1.0))
    record = make_record([0.0, 1.0, 0.5, 1.0], ["3", "4", "3", "4"], scores)
    assert metrics.of_problem(record, has_answers=True) == {
        "avg@4": 0.5,  # half right is wrong
        "pass@2": 1 - 1 / 6,  # of 6 pairs one has no right sample
        "pass@4": 1.0,
        "maj@2": 0.0,  # a tie
        "maj@4": 0.0,  # a tie
        "best@2 (min)": 1.0,
        "best@4 (min)": 1.0,
        "best@2 (sum)": 0.0,
        "best@4 (sum)": 1.0,
        "best@2 (last)": 0.0,
        "best@4 (last)": 0.0,  # the first of equals
    }


def test_what_is_not_there_has_no_figure(make_record, make_scores):
    found = metrics.of_problem(make_record([1.0, 0.0]), has_answers=False)
    assert found == {"avg@2": 0.5, "pass@2": 1.0}
    half = make_record([1.0, 0.0], prm=[*make_scores((0.0, 0.0, 0.0)), None])
    assert metrics.of_problem(half, has_answers=False) == found


def test_intervals_are_those_of_the_binomial_distribution():
    """A resampled mean of n zeros and ones with m ones is Binomial(n, m / n) / n."""
    rows = 60
    table = np.array([[float(i < 18), float(i < 57)] for i in range(rows)])
    low, high = metrics.bootstrap(table, seed=3)
    for column, ones in enumerate((18, 57)):
        chances = [
            comb(rows, i) * (ones / rows) ** i * (1 - ones / rows) ** (rows - i)
            for i in range(rows + 1)
        ]
        ends = np.searchsorted(np.cumsum(chances), [0.025, 0.975]) / rows
        assert [low[column], high[column]] == pytest.approx(ends, abs=1.01 / rows)


def test_a_seed_gives_the_same_interval_and_resamples_come_whole():
    table = np.random.default_rng(0).random((40, 3))
    first, again = metrics.bootstrap(table, 5), metrics.bootstrap(table, 5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, metrics.bootstrap(table, 6))
    # Rows are drawn, not cells: what is equal in every row stays equal.
    low, high = metrics.bootstrap(np.repeat(table[:, :1], 2, axis=1), 5, resamples=1500)
    assert (low[0], high[0]) == (low[1], high[1])


def test_a_summary_is_the_mean_with_its_interval():
    problems = [{"a": 1.0, "b": 0.5}] * 3 + [{"a": 0.0, "b": 0.5}]
    found = metrics.summarize(problems, seed=0)
    assert found["a"].value == 0.75
    assert found["a"].low < 0.75 < found["a"].high
    assert found["b"] == metrics.Figure(0.5, 0.5, 0.5)
