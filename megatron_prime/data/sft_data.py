"""Conversations for supervised fine-tuning, with the loss on what the assistant writes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prime.data.chat import (
    Tokenizer,
    check_tokenizer,
    encode_conversation,
    parse_messages,
)
from megatron_prime.data.rows import DataError, Row, read_rows


@dataclass(frozen=True, slots=True)
class SftExample:
    """A conversation as the model sees it; `loss_mask[t]` says whether token t is learnt."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SftSet:
    """The conversations of a file, in its order."""

    examples: tuple[SftExample, ...]
    dropped_long: int  # rows left out because they are too long


def fingerprint(examples: Sequence[SftExample]) -> str:
    """16 hex digits that change with any token, and with what is learnt."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(array("q", [len(example.token_ids), *example.token_ids]))
        digest.update(bytes(example.loss_mask))
    return digest.hexdigest()


def load_conversations(path: Path, tokenizer: Tokenizer, max_length: int) -> SftSet:
    """Read conversations, rows {"messages": [{role, content}, …]} that end with the assistant's.

    Those of more than `max_length` tokens are counted and dropped. Raises DataError for a file
    without usable conversations and for all malformed rows at once, TokenizerError for a tokenizer
    without chat template or EOS token.
    """
    check_tokenizer(tokenizer)

    def parse(number: int, row: Row) -> SftExample:
        return SftExample(*encode_conversation(tokenizer, parse_messages(row, "messages")))

    examples = read_rows(path, parse)
    fitting = tuple(example for example in examples if len(example.token_ids) <= max_length)
    if not fitting:
        raise DataError(
            f"{path}: found {len(examples)} conversations, the shortest of"
            f" {min(len(example.token_ids) for example in examples)} tokens, wanted at most"
            f" {max_length}; raise sft.max_length"
        )
    return SftSet(fitting, len(examples) - len(fitting))
