"""A reference that knows its sequences by heart."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import RolloutBatch, TokenSequence

before_megatron_import()

from megatron_prime.models.reference import RememberedReference  # noqa: E402

SEQUENCES = (TokenSequence((5, 6, 7), 1), TokenSequence((5, 6, 7), 2), TokenSequence((8, 9), 1))


def batch(*numbers):
    sequences = tuple(SEQUENCES[n] for n in numbers)
    lengths = torch.tensor([s.response_length for s in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return RolloutBatch(sequences, 1, mask, torch.zeros(len(mask)), torch.zeros(mask.shape))


def test_it_gives_back_what_it_was_told_row_by_row():
    """Where the response begins is part of a sequence."""
    reference = RememberedReference(SEQUENCES, torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert reference.logprobs(batch(2, 0, 2)).tolist() == [[-4.0, 0.0], [-1.0, -2.0], [-4.0, 0.0]]
    assert reference.logprobs(batch(1)).tolist() == [[-3.0]]


def test_it_keeps_no_tokens():
    sequences = tuple(TokenSequence((5, n, 700 + n), 1) for n in range(3))
    before = [sys.getrefcount(s) + sys.getrefcount(s.token_ids) for s in sequences]
    reference = RememberedReference(sequences, torch.zeros(6))
    assert [sys.getrefcount(s) + sys.getrefcount(s.token_ids) for s in sequences] == before
    del reference


def test_too_few_log_probs_are_refused():
    with pytest.raises(ValueError, match="found 3 log-probs, wanted 4"):
        RememberedReference(SEQUENCES, torch.zeros(3))
