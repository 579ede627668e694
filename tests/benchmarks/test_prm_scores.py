"""PRM scores against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.benchmarks.prm_scores import prm_scores

PAD = 1e9


def test_three_ways_to_make_one_number_of_a_response():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.25, -0.75, 0.25], [-1.0, PAD, -PAD]])
    first, second = prm_scores(rewards, mask)
    assert (first.min, first.sum, first.last) == pytest.approx((-0.75, -0.25, 0.25))
    assert (second.min, second.sum, second.last) == pytest.approx((-1.0, -1.0, -1.0))
