from __future__ import annotations

import math

import pytest
import torch

from megatron_prime.algorithm.prm_health import (
    calibration_error,
    correlation,
    last_tokens_share,
    prm_health,
)


def logit(chance):
    return math.log(chance / (1 - chance))


def test_health_agrees_with_plain_python(golden):
    """All figures of the golden batch's rewards, token by token."""
    lengths = golden.mask.sum(1).tolist()
    rewards = [
        [-20 * 0.05 * float(golden.prm[i, t] - golden.ref[i, t]) for t in range(lengths[i])]
        for i in range(8)
    ]
    outcomes, sums = golden.outcomes.tolist(), [sum(row) for row in rewards]
    chances = [1 / (1 + math.exp(-x)) for x in sums]
    bins = {}
    for p, o in zip(chances, outcomes, strict=True):
        bins.setdefault(int(15 * p), []).append((p, o))
    error = sum(
        len(b) / 8 * abs(sum(p for p, _ in b) / len(b) - sum(o for _, o in b) / len(b))
        for b in bins.values()
    )
    last = sum(sum(map(abs, row[-math.ceil(len(row) / 10) :])) for row in rewards)
    right = [x for x, o in zip(sums, outcomes, strict=True) if o == 1]
    wrong = [x for x, o in zip(sums, outcomes, strict=True) if o != 1]
    wanted = {
        "predicted_accuracy": sum(chances) / 8,
        "over_optimisation_gap": (sum(chances) - sum(outcomes)) / 8,
        "calibration_error": error,
        "length_correlation": pearson(sums, lengths),
        "last_tokens_share": last / sum(abs(x) for row in rewards for x in row),
        "reward_right_mean": sum(right) / len(right),
        "reward_right_std": deviation(right),
        "reward_wrong_mean": sum(wrong) / len(wrong),
        "reward_wrong_std": deviation(wrong),
    }
    given = -20 * 0.05 * (golden.prm - golden.ref)
    given[~golden.mask] = math.nan  # padding counts nothing
    found = prm_health(given, golden.outcomes, golden.mask)
    assert found == pytest.approx(wanted, abs=1e-9)
    assert len(bins) > 3, "several bins, or the test means little"


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    both = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return both / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def deviation(values):
    centre = sum(values) / len(values)
    return math.sqrt(sum((x - centre) ** 2 for x in values) / (len(values) - 1))


def test_a_prm_that_says_what_is_so_is_calibrated():
    """Of ten responses with sigmoid(R) = 0.8, eight are right; with 0.5, one of two."""
    chances = torch.tensor([0.8] * 10 + [0.5] * 2)
    outcomes = torch.tensor([1.0] * 8 + [0.0] * 2 + [1.0, 0.0])
    assert calibration_error(chances, outcomes) == pytest.approx(0, abs=1e-6)
    # Turned round, each of the ten is 0.6 off: 0.8 said, 0.2 so.
    outcomes = torch.tensor([1.0] * 2 + [0.0] * 8 + [1.0, 0.0])
    assert calibration_error(chances, outcomes) == pytest.approx(10 / 12 * 0.6, abs=1e-6)
    assert calibration_error(torch.ones(3), torch.ones(3)) == 0, "the last bin has its end"


def test_rounding_about_one_half_does_not_change_the_bin():
    outcomes = torch.tensor([1.0, 0.0])
    found = calibration_error(torch.tensor([0.5 - 1e-6, 0.5 + 1e-6]), outcomes)
    assert found == pytest.approx(0, abs=1e-5)


def test_a_reward_for_length_is_seen():
    lengths = torch.tensor([1, 2, 3, 4])
    assert correlation(3.0 * lengths - 1, lengths) == pytest.approx(1)
    assert correlation(-lengths.float(), lengths) == pytest.approx(-1)
    assert correlation(torch.tensor([1.0, -1, -1, 1]), lengths) == pytest.approx(0)
    assert correlation(torch.ones(4), lengths) == 0


def test_the_last_tenth_is_rounded_up():
    """Of 11 tokens the last two, of one token that one."""
    mask = torch.arange(11) < torch.tensor([11, 1])[:, None]
    rewards = torch.zeros(2, 11)
    rewards[0, 8], rewards[0, 9], rewards[0, 10], rewards[1, 0] = 4.0, -1.0, 2.0, 1.0
    assert last_tokens_share(rewards, mask) == pytest.approx((1 + 2 + 1) / 8)
    assert last_tokens_share(torch.zeros(2, 11), mask) == 0


def test_over_optimisation_is_to_think_better_than_is_so():
    rewards = torch.tensor([[logit(0.9)], [logit(0.7)]])
    found = prm_health(rewards, torch.tensor([1.0, 0.0]), torch.ones(2, 1).bool())
    assert found["predicted_accuracy"] == pytest.approx(0.8)
    assert found["over_optimisation_gap"] == pytest.approx(0.3)
    assert found["reward_right_std"] == 0, "of a single one"


def test_a_side_without_responses_has_no_figures():
    found = prm_health(torch.zeros(2, 1), torch.tensor([0.5, 0.0]), torch.ones(2, 1).bool())
    assert not [name for name in found if "right" in name]
    assert found["reward_wrong_mean"] == 0
