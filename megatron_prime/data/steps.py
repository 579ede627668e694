"""Which tokens end a step: those with which a separator, such as an empty line, is complete.

Tokens don't respect separators: one may hold the end of a sentence and the separator, or two may
hold half of it each. So the pieces of text that tokens decode to are joined again, and the token
that completes the separator is the step's last. Pieces are decoded one by one and kept, for the
same few thousand tokens come again and again; a character that is spread over several tokens is
not legible then, which does no harm to the separators between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_prime.config import AdvantageOptions
from megatron_prime.protocols import StepReader
from megatron_prime.types import RolloutBatch


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens."""
        ...


def step_reader(options: AdvantageOptions, decoder: Decoder) -> StepReader:
    """By the run's separator; one that reads nothing if nobody asks for steps."""
    if options.process_weight > 0 and options.granularity == "step":
        return SeparatedSteps(decoder, options.step_separator)
    return NoSteps()


class NoSteps:
    """A StepReader for runs whose rewards don't stand at steps."""

    def step_ends(self, batch: RolloutBatch) -> None:
        """Nothing."""


class SeparatedSteps:
    """A StepReader that looks for a separator."""

    def __init__(self, decoder: Decoder, separator: str) -> None:
        self._decoder = decoder
        self._separator = separator
        self._pieces: dict[int, str] = {}

    def step_ends(self, batch: RolloutBatch) -> Tensor:
        """Where separators are complete; a response without any has no end here: bool [N, T]."""
        ends = torch.zeros_like(batch.response_mask)
        for row, sequence in enumerate(batch.sequences):
            found = list(self._ends(sequence.token_ids[sequence.prompt_length :]))
            ends[row, found] = True
        return ends

    def _ends(self, token_ids: Sequence[int]) -> Iterator[int]:
        separator, rest = self._separator, ""  # text that may still become part of a separator
        for position, token in enumerate(token_ids):
            text = rest + self._piece(token)
            end = text.rfind(separator)
            if end >= 0:
                yield position
                text = text[end + len(separator) :]
            rest = text[-(len(separator) - 1) :] if len(separator) > 1 else ""

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._decoder.decode([token], skip_special_tokens=True)
        return self._pieces[token]
