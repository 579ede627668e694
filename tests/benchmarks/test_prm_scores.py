"""PRM scores against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.benchmarks.prm_scores import prm_scores
from megatron_prime.benchmarks.records import EvaluationError

PAD = 1e9


def test_three_ways_to_make_one_number_of_a_response():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    prm = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, PAD, -PAD]])
    ref = torch.tensor([[-1.5, -0.5, -1.0], [-1.0, -PAD, 0.0]])
    first, second = prm_scores(prm, ref, mask, beta=0.5)
    assert (first.min, first.sum, first.last) == pytest.approx((-0.75, -0.25, 0.25))
    assert (second.min, second.sum, second.last) == pytest.approx((-1.0, -1.0, -1.0))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_refused_but_on_padding(broken):
    mask = torch.tensor([[True, True], [True, False]])
    prm, ref = torch.tensor([[-1.0, -2.0], [-3.0, broken]]), torch.full((2, 2), -1.0)
    assert prm_scores(prm, ref, mask, beta=0.5)[1].sum == -1.0
    prm[1, 0] = broken
    for pair in ((prm, ref), (ref, prm)):
        with pytest.raises(EvaluationError, match="in 1 of 2 responses, the first in number 1;"):
            prm_scores(*pair, mask, beta=0.5)
