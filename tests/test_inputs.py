import json
from pathlib import Path

import pytest

from megatron_prime import inputs
from megatron_prime.config import ConfigError, VerifySection
from megatron_prime.data.prompts import PromptSet
from megatron_prime.data.rows import DataError
from megatron_prime.types import Prompt
from megatron_prime.verify import seccomp

TESTS = json.dumps({"inputs": ["1"], "outputs": ["1"]})


class Config:
    """What `prompts_of` asks for."""

    class data:
        template, max_prompt_length = "prime", 1024

    verify = VerifySection()


@pytest.fixture
def read(monkeypatch):
    """Prompts of the given (ability, ground truth), as if they stood in a file."""

    def read(*rows):
        found = tuple(Prompt(i, (1,), truth, what, "x") for i, (what, truth) in enumerate(rows))
        monkeypatch.setattr(inputs, "load_prompts", lambda *_: PromptSet(found, 0))
        monkeypatch.setattr(inputs.dist, "get_rank", lambda: 0)
        return inputs.prompts_of(Config(), Path("x.jsonl"), None)

    return read


def test_mathematics_and_programs_are_both_welcome(read):
    assert [p.ability for p in read(("math", "7"), ("code", TESTS))] == ["math", "code"]


def test_tests_that_can_not_be_read_stop_the_start(read):
    with pytest.raises(DataError, match=r"malformed tests:\n  row 1 \(x\): .*at least one"):
        read(("code", TESTS), ("code", '{"inputs": [], "outputs": []}'))


def test_programs_need_a_sandbox_and_mathematics_none(read, monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine, may_open: bytes(8))
    assert len(read(("math", "7"))) == 1
    with pytest.raises(ConfigError, match="sandbox unavailable"):
        read(("math", "7"), ("code", TESTS))
