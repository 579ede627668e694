"""The frozen model in the PRM's log-ratio and the policy's KL: the SFT weights, never trained.

What it says of a sequence never changes. Where the sequences are known beforehand, as in the
offline training of a PRM, it may speak once and go: `RememberedReference` has its log-probs.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prime.models.engine import Engine
from megatron_prime.models.guard import Guard
from megatron_prime.types import RolloutBatch, TokenSequence


class MegatronReference:
    """A ScoringModel without optimizer or gradients."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        for module in engine.modules:
            module.requires_grad_(False)
        self.engine = engine
        self.guard = guard

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses at temperature 1: float32 [N, T]."""
        return self.guard.logprobs(self.engine, batch)


class RememberedReference:
    """A ScoringModel of sequences that are known by heart, without a model."""

    def __init__(self, sequences: Sequence[TokenSequence], logprobs: Tensor) -> None:
        """`logprobs` (float32 [tokens]) of all responses, one after the other.

        ValueError unless they are as many as the response tokens.
        """
        lengths = [sequence.response_length for sequence in sequences]
        if len(logprobs) != sum(lengths):
            raise ValueError(f"found {len(logprobs)} log-probs, wanted {sum(lengths)}")
        self._logprobs, self._first = logprobs, dict[bytes, int]()
        start = 0
        for sequence, length in zip(sequences, lengths, strict=True):
            self._first[_digest(sequence)] = start
            start += length

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses at temperature 1: float32 [N, T]."""
        found = torch.zeros(batch.response_mask.shape)
        found[batch.response_mask] = torch.cat([self._of(s) for s in batch.sequences])
        return found

    def _of(self, sequence: TokenSequence) -> Tensor:
        start = self._first[_digest(sequence)]
        return self._logprobs[start : start + sequence.response_length]


def _digest(sequence: TokenSequence) -> bytes:
    """16 bytes in place of all tokens: what is kept of a response must be small."""
    numbers = array("q", [sequence.prompt_length, *sequence.token_ids])
    return hashlib.blake2b(numbers, digest_size=16).digest()
