"""Lines of scores: tokens, steps and sums that fit together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_tokenizer
import pytest
import torch

from megatron_prime.config import RunConfig
from megatron_prime.data.answered import Answered
from megatron_prime.data.rows import DataError
from megatron_prime.data.steps import SeparatedSteps
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.runtime.line_files import RecordsError

before_megatron_import()

from megatron_prime.score import (  # noqa: E402
    Item,
    ScoredText,
    check_lengths,
    continued,
    fingerprint,
    scored,
)

make_tokenizer, tokenizer = byte_tokenizer.make_tokenizer, byte_tokenizer.tokenizer  # fixtures
PROMPT = (1, 2, 3)
MODEL = {"model_type": "qwen2", "max_position_embeddings": 64}


def items(tokenizer: Any, *texts: str, labels: tuple[float, ...] | None = None) -> list[Item]:
    eos = (tokenizer.eos_token_id,)
    ids = tuple((*tokenizer.encode(text, add_special_tokens=False), *eos) for text in texts)
    row = Answered("line 4", "name", PROMPT, ids, labels)
    return [Item(row, number) for number in range(len(texts))]


def lines(tokenizer: Any, *texts: str, **more: Any) -> list[ScoredText]:
    """Token t of a response is rewarded with 2^-t, so that a sum tells which tokens are in it."""
    found = items(tokenizer, *texts, **more)
    lengths = torch.tensor([item.sequence.response_length for item in found])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rewards = torch.where(mask, 0.5 ** torch.arange(mask.shape[1], dtype=torch.float64), torch.nan)
    return list(scored(found, rewards, mask, tokenizer, SeparatedSteps(tokenizer, "\n\n")))


def test_steps_end_with_the_separator_and_cover_the_response(tokenizer: Any) -> None:
    (line,) = lines(tokenizer, "é\n\nab\n\nc")
    assert line.text == "é\n\nab\n\nc"
    assert [line.text[slice(*step.characters)] for step in line.steps] == ["é\n\n", "ab\n\n", "c"]
    assert [step.tokens for step in line.steps] == [(0, 4), (4, 8), (8, 10)]
    for step in line.steps:
        first, behind = step.tokens
        assert step.reward == pytest.approx(2 * (0.5**first - 0.5**behind))
    assert line.tokens == ("", "é", "\n", "\n", "a", "b", "\n", "\n", "c", "")
    assert line.rewards == tuple(0.5**t for t in range(10))
    assert line.total == pytest.approx(2 * (1 - 0.5**10))
    assert line.probability == pytest.approx(1 / (1 + math.exp(-line.total)))


def test_a_separator_at_the_end_leaves_a_step_of_the_end_alone(tokenizer: Any) -> None:
    (line,) = lines(tokenizer, "a\n\n")
    assert [step.tokens for step in line.steps] == [(0, 3), (3, 4)]
    assert line.steps[1].characters == (3, 3)


def test_each_response_of_a_row_has_a_line(tokenizer: Any) -> None:
    one, two = lines(tokenizer, "ab", "c", labels=(1.0, 0.0))
    assert (one.row, one.id, one.response, one.label) == ("line 4", "name", 0, 1.0)
    assert (two.response, two.label, two.text) == (1, 0.0, "c")
    assert len(two.rewards) == 2, "padding is left out"
    assert lines(tokenizer, "ab")[0].label is None


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for name in ("reference", "prm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(MODEL))
    return RunConfig.model_validate(
        {
            "run": {"folder": tmp_path},
            "model": {"hf": tmp_path / "reference"},
            "data": {"train": "unused"},
            "prm": {"hf": tmp_path / "prm", "micro_batch_tokens": 16},
            "score": {"prm": tmp_path / "prm", "chunk": 2},
        }
    )


def test_texts_without_room_are_named(config: RunConfig, tokenizer: Any) -> None:
    check_lengths(config, Path("texts.jsonl"), items(tokenizer, "a" * 12))
    with pytest.raises(DataError) as error:
        check_lengths(config, Path("texts.jsonl"), items(tokenizer, "a", "a" * 13, "a" * 60))
    assert str(error.value).splitlines() == [
        "texts.jsonl: found 2 responses that are too long, wanted at most 16 tokens "
        "(prm.micro_batch_tokens, and the 64 positions of the models):",
        "  line 4: response 1 has 17 tokens with its prompt",
        "  line 4: response 2 has 64 tokens with its prompt",
    ]


def test_scores_of_other_texts_or_another_prm_are_refused(
    config: RunConfig,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    output, texts = tmp_path / "scores.jsonl", items(tokenizer, "ab", "c")
    assert continued(config, output, texts) == 0
    with pytest.raises(RecordsError, match="  texts: found"):
        continued(config, output, items(tokenizer, "ab", "d"))
    other = config.model_copy(update={"prm": config.prm.model_copy(update={"beta": 0.1})})
    with pytest.raises(RecordsError, match=r"  beta: found 0\.1, made with 0\.05"):
        continued(other, output, texts)
    (tmp_path / "prm" / "model.safetensors").touch()
    with pytest.raises(
        RecordsError, match=r"remove it and scores\.options\.json,.*\n  prm_weights: found"
    ):
        continued(config, output, texts)


def test_other_number_formats_are_refused(
    config: RunConfig, tokenizer: Any, tmp_path: Path
) -> None:
    output, texts = tmp_path / "scores.jsonl", items(tokenizer, "ab", "c")
    assert continued(config, output, texts) == 0
    for model in ("prm", "reference"):
        changed = config.precision.of(model).model_copy(update={"fp8": "e4m3"})
        precision = config.precision.model_copy(update={model: changed})
        other = config.model_copy(update={"precision": precision})
        with pytest.raises(RecordsError, match=f"  precision.{model}.fp8: found 'e4m3', made with"):
            continued(other, output, texts)


def test_a_file_of_somebody_else_s_is_left_alone(
    config: RunConfig, tokenizer: Any, tmp_path: Path
) -> None:
    """scores.json beside scores.jsonl is none of ours; what stands in our place must be ours."""
    output, texts = tmp_path / "scores.jsonl", items(tokenizer, "ab", "c")
    other = tmp_path / "scores.json"
    other.write_text('{"mine": 1}')
    assert continued(config, output, texts) == 0
    assert other.read_text() == '{"mine": 1}'
    for content in (b"[1]", b"no JSON", b"\xff"):
        (tmp_path / "scores.options.json").write_bytes(content)
        with pytest.raises(RecordsError, match=r"scores\.options\.json: found no table of options"):
            continued(config, output, texts)


@pytest.mark.parametrize("change", [{"place": "line 5"}, {"id": "other"}, {"labels": (1.0, 0.0)}])
def test_all_that_a_line_repeats_of_the_input_is_in_the_fingerprint(
    tokenizer: Any, change: dict[str, Any]
) -> None:
    first = items(tokenizer, "ab", "c", labels=(1.0, 1.0))
    changed = replace(first[0].row, **change)
    assert fingerprint(first) != fingerprint([Item(changed, 0), Item(changed, 1)])


def test_where_the_response_begins_makes_another_text(tokenizer: Any) -> None:
    (item,) = items(tokenizer, "ab")
    row = item.row
    moved = Answered(
        row.place, row.id, (*PROMPT, row.responses[0][0]), (row.responses[0][1:],), None
    )
    assert fingerprint([item]) != fingerprint([Item(moved, 0)])
