"""A tokenizer of one token per character, and records of given scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prime.benchmarks.records import PrmScores, Record, Response


class Letters:
    """Token ids are code points; the template marks roles and the opening of an answer."""

    chat_template = "given"
    eos_token_id = 0

    def apply_chat_template(self, conversation, *, add_generation_prompt, return_dict):
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
        return [ord(letter) for letter in text + "<assistant>" * add_generation_prompt]

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(map(chr, token_ids))


@pytest.fixture
def tokenizer():
    return Letters()


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="set.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def make_record():
    def make(scores, answers=None, prm=None, name="p0", lengths=None, reason="stop"):
        answers = answers or [None] * len(scores)
        prm = prm or [None] * len(scores)
        lengths = lengths or [3] * len(scores)
        responses = tuple(
            Response("text", tuple(range(length)), reason, score, answer, numbers)
            for score, answer, numbers, length in zip(scores, answers, prm, lengths, strict=True)
        )
        return Record(name, int(name[1:]), "0" * 16, "4", responses, 0)

    return make


@pytest.fixture
def make_scores():
    return lambda *rows: [PrmScores(*row) for row in rows]
