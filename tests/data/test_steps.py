from __future__ import annotations

import pytest
import torch

from megatron_prime.config import AdvantageOptions
from megatron_prime.data.steps import step_reader
from megatron_prime.types import Prompt, Rollout, RolloutBatch, VerifiedGroup

PIECES = ["a", "b.", "\n", "\n\n", ".\n\n", "\n\nc", "", "\n\n\n\n"]
EMPTY_LINE = AdvantageOptions(granularity="step")


class Pieces:
    """A tokenizer of eight tokens that counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def decode(self, token_ids, *, skip_special_tokens):
        assert skip_special_tokens
        self.asked += 1
        return "".join(PIECES[token] for token in token_ids)


def batch(*responses):
    rollouts = tuple(Rollout(tuple(r), (-1.0,) * len(r), "stop", 0, "") for r in responses)
    prompt = Prompt(0, (3, 3, 3), "", "math", "test")  # whose separators don't count
    return RolloutBatch.from_groups([VerifiedGroup(prompt, rollouts, (0.0,) * len(rollouts), 0)])


def places(options, *responses):
    ends = step_reader(options, Pieces()).step_ends(batch(*responses))
    assert ends.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in ends]


@pytest.mark.parametrize(
    ("response", "ends"),
    [
        ([0, 3, 1, 3, 0, 6], [1, 3]),  # a token of its own
        ([0, 4, 0], [1]),  # at the end of a token
        ([0, 5, 0], [1]),  # at the start of the token that holds the next step's first word
        ([0, 2, 2, 0], [2]),  # in two halves
        ([0, 2, 6, 2, 0], [3]),  # with a special token between them
        ([0, 2, 0, 2, 0], []),  # two lines, but no empty one
        ([0, 2, 3, 0], [2]),  # three line breaks are one separator and a half
        ([2, 2, 2, 2], [1, 3]),
        ([0, 7, 0], [1]),  # one token ends one step
        ([0, 1, 0], []),
        ([6], []),
    ],
)
def test_a_step_ends_with_the_token_that_completes_the_separator(response, ends):
    assert places(EMPTY_LINE, response) == [ends]


def test_rows_stand_for_themselves():
    """A row's half separator is not completed by the next row."""
    assert places(EMPTY_LINE, [0, 2], [2, 3, 0], [0]) == [[], [1], []]


def test_separators_of_one_character():
    options = AdvantageOptions(granularity="step", step_separator=".")
    assert places(options, [0, 1, 4, 2, 1]) == [[1, 2, 4]]


def test_a_token_is_decoded_once():
    pieces = Pieces()
    reader = step_reader(EMPTY_LINE, pieces)
    for _ in range(3):
        reader.step_ends(batch([0, 3, 0, 3], [3, 0]))
    assert pieces.asked == 2


@pytest.mark.parametrize(
    "options",
    [
        AdvantageOptions(),
        AdvantageOptions(granularity="response"),
        AdvantageOptions(granularity="step", process_weight=0.0),
    ],
)
def test_nothing_is_read_if_nobody_asks_for_steps(options):
    pieces = Pieces()
    assert step_reader(options, pieces).step_ends(batch([0, 3, 0])) is None
    assert pieces.asked == 0
