"""Prompts with responses, in every form in which they come."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from megatron_prime.data.answered import read_answered
from megatron_prime.data.chat import (
    MATH_SUFFIX,
    Message,
    encode_conversation,
    encode_prompt,
)
from megatron_prime.data.rows import DataError
from megatron_prime.runtime.rollout_files import write_step
from megatron_prime.types import Prompt, Rollout, VerifiedGroup

ASKED = [Message("user", "1+1=")]
GROUP = VerifiedGroup(
    Prompt(7, (1, 2), "4", "math", "test"),
    (
        Rollout((3, 4), (-0.25, -1e-7), "stop", 5, '!"'),  # as the tokenizer below reads them
        Rollout((3, 9, 9), (-0.1, -0.5, -0.5), "length", 5, "!''"),
    ),
    (1.0, 0.5),
    0,
)


def read(path, tokenizer, labelled=True, template="plain"):
    return read_answered(path, tokenizer, template, labelled, len(tokenizer))


def test_a_response_has_the_tokens_of_fine_tuning(write_jsonl, tokenizer):
    path = write_jsonl(
        [
            {"prompt": "1+1=", "responses": ["2", "two"], "labels": [1, 0.5], "id": 12},
            {"messages": [{"role": "user", "content": "1+1="}], "responses": ["3"], "labels": [0]},
            {
                "messages": [
                    {"role": "user", "content": "1+1="},
                    {"role": "assistant", "content": "2"},
                ],
                "label": True,
            },
        ]
    )
    first, second, third = read(path, tokenizer)
    prompt = encode_prompt(tokenizer, ASKED)
    for answer, row, number in [("2", first, 0), ("two", first, 1), ("3", second, 0)]:
        ids, mask = encode_conversation(tokenizer, [*ASKED, Message("assistant", answer)])
        assert row.prompt_ids == prompt == ids[: len(prompt)]
        assert row.responses[number] == ids[len(prompt) :]
        assert sum(mask) == len(row.responses[number])
    assert (first.id, first.place, first.labels) == ("12", "line 1", (1.0, 0.5))
    assert third.responses == first.responses[:1]
    assert third.labels == (1.0,)


def test_earlier_answers_belong_to_the_prompt(write_jsonl, tokenizer):
    talk = [("user", "hi"), ("assistant", "yes?"), ("user", "1+1="), ("assistant", "2")]
    messages = [{"role": role, "content": content} for role, content in talk]
    (row,) = read(write_jsonl([{"messages": messages, "label": 1}]), tokenizer)
    ids, _ = encode_conversation(tokenizer, [Message(*turn) for turn in talk])
    assert row.prompt_ids + row.responses[0] == ids
    assert tokenizer.decode(row.responses[0]) == "2<|im_end|>"


def test_the_template_is_that_of_the_policys_prompts(write_jsonl, tokenizer):
    row = {"prompt": "1+1=", "responses": ["2"], "labels": [1]}
    path = write_jsonl([row, {**row, "ability": "code"}])
    math, code = read(path, tokenizer, template="prime")
    assert tokenizer.decode(math.prompt_ids).count(MATH_SUFFIX) == 1
    assert "Write Python code" in tokenizer.decode(code.prompt_ids)


def test_rollouts_keep_their_tokens(tmp_path, tokenizer):
    """Also those that were cut and have no EOS; from the folder, or a file of it."""
    write_step(tmp_path / "rollouts", 1, [GROUP])
    write_step(tmp_path / "rollouts", 2, [])
    write_step(tmp_path / "rollouts", 3, [GROUP])
    one, two = read(tmp_path / "rollouts", tokenizer)
    assert one.place == "step_000001.jsonl, line 1"
    assert (one.id, one.prompt_ids, one.labels) == ("7", (1, 2), (1.0, 0.5))
    assert one.responses == two.responses == ((3, 4), (3, 9, 9))
    (of_file,) = read(tmp_path / "rollouts" / "step_000003.jsonl", tokenizer)
    assert of_file.responses == one.responses


def test_malformed_rows_are_reported_at_once(write_jsonl, tokenizer):
    good = {"prompt": "1+1=", "responses": ["2", "3"], "labels": [1, 0]}
    group = TypeAdapter(VerifiedGroup).dump_python(GROUP, mode="json")
    path = write_jsonl(
        [
            good,
            {**good, "labels": [1]},
            {**good, "labels": [1, 1.5]},
            {**good, "labels": [1, "no"]},
            {**good, "responses": ["2", ""]},
            {"prompt": "1+1=", "responses": ["2"]},
            {"messages": [{"role": "user", "content": "1+1="}], "label": 1},
            {**good, "ability": "poetry"},
            {**group, "rollouts": [{}]},
            {**group, "outcome_rewards": [1.0]},
            {**group, "outcome_rewards": [1.0, 1.5]},
            {**group, "prompt": {**group["prompt"], "token_ids": [1, 300]}},
            {**group, "rollouts": [{**group["rollouts"][0], "text": "4"}, group["rollouts"][1]]},
        ]
    )
    with pytest.raises(DataError) as error:
        read(path, tokenizer)
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: malformed rows: 12"
    wanted = [
        "line 2: labels: found [1], wanted a list of 2, as responses",
        "line 3: labels[1]: found 1.5, wanted a number from 0 to 1",
        "line 4: labels[1]: found 'no', wanted a number from 0 to 1",
        "line 5: responses[1]: found '', wanted a non-empty str",
        "line 6: labels: found nothing, wanted a number in [0, 1] for each response",
        "line 7: messages: found 'user' as the last role of 1 messages",
        "line 8: ability: found 'poetry', wanted 'math' or 'code'",
        "line 9: found rollouts that no run wrote (rollouts.0.response_ids: Field required)",
        "line 10: found 2 rollouts with 1 outcome_rewards, wanted as many",
        "line 11: outcome_rewards[1]: found 1.5, wanted a number from 0 to 1",
        "line 12: found the token 300, wanted tokens below 259, the vocab_size of model.hf",
        "line 13: rollouts[0]: found tokens that the tokenizer of model.hf reads as",
    ]
    for line, start in zip(lines, wanted, strict=True):
        assert line.strip().startswith(start)


def test_labels_are_for_those_who_learn(write_jsonl, tokenizer):
    (row,) = read(write_jsonl([{"prompt": "a", "responses": ["b"]}]), tokenizer, labelled=False)
    assert row.labels is None


def test_nothing_to_read(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"is empty; wanted step_\*\.jsonl with rollouts"):
        read(tmp_path, tokenizer)
