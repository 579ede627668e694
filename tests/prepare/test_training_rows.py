import json
from dataclasses import replace

import pytest

from megatron_prime.data.chat import MATH_SUFFIX, PRIME_SYSTEM_PROMPT, Message
from megatron_prime.data.prompts import load_prompts
from megatron_prime.data.sft_data import load_conversations
from megatron_prime.prepare.items import Dropped
from megatron_prime.prepare.training_rows import (
    conversation_rows,
    conversation_screen,
    prompt_rows,
    prompt_screen,
)

LOOSE = (  # writes a signature behind each turn that it doesn't close before
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }} -- signed"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def refuse(pairs):
    return [False] * len(pairs)


@pytest.fixture
def conversation(make_item):
    def make(*contents):
        roles = ["user", "assistant"] * len(contents)
        messages = [Message(role, text) for role, text in zip(roles, contents, strict=False)]
        return replace(make_item("\n".join(contents), ""), messages=tuple(messages))

    return make


def test_the_project_reads_the_prompt_rows_with_the_length_they_were_measured_at(
    make_item, tokenizer, write_jsonl
):
    item = make_item("What is 2+3?", "5", number=4)
    for template, extra in (("plain", 0), ("prime", len(MATH_SUFFIX) + len(PRIME_SYSTEM_PROMPT))):
        for limit in range(20 + extra, 90 + extra):
            found = prompt_rows(tokenizer, template, limit)(item, "train")
            if not isinstance(found, Dropped):
                break
            assert found.rule == "too_long"
        path = write_jsonl([found])
        read = load_prompts(path, tokenizer, template, limit)
        assert [len(prompt.token_ids) for prompt in read.prompts] == [limit]
        assert read.prompts[0].ground_truth == "5"
        assert found["extra_info"] == {"split": "train", "index": 4, "file": "a.jsonl"}


def test_the_prime_template_is_the_papers_and_holds_when_applied_again(make_item, tokenizer):
    row = prompt_rows(tokenizer, "prime", 5000)(make_item("What?", "5"), "train")
    assert row["prompt"] == [
        {"role": "system", "content": PRIME_SYSTEM_PROMPT},
        {"role": "user", "content": "What?" + MATH_SUFFIX},
    ]
    again = replace(make_item("What?", "5"), messages=tuple(Message(**m) for m in row["prompt"]))
    assert prompt_rows(tokenizer, "prime", 5000)(again, "train")["prompt"] == row["prompt"]


def test_lines_of_stdin_become_texts_and_arguments_stay(make_item, tokenizer):
    finish = prompt_rows(tokenizer, "plain", 5000)
    tests = {"inputs": [["1", "2"], "3\n"], "outputs": [["4", "5"], "6\n"]}
    row = finish(make_item("p", json.dumps(tests), ability="code"), "train")
    truth = json.loads(row["reward_model"]["ground_truth"])
    assert truth == {"inputs": ["1\n2", "3\n"], "outputs": ["4\n5", "6\n"]}
    call = {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "f"}
    row = finish(make_item("p", json.dumps(call), ability="code"), "train")
    assert json.loads(row["reward_model"]["ground_truth"]) == call


def test_the_project_reads_the_conversation_rows_and_learns_the_answers_alone(
    conversation, tokenizer, write_jsonl
):
    item = conversation("What is 2+3?", "It is 5.", "And 3+3?", "6, of course.")
    row = conversation_rows(tokenizer, "plain", 500)(item, "train")
    loaded = load_conversations(write_jsonl([row]), tokenizer, 500).examples[0]
    learnt = [t for t, m in zip(loaded.token_ids, loaded.loss_mask, strict=True) if m]
    assert tokenizer.decode(learnt) == "It is 5.<|im_end|>6, of course.<|im_end|>"
    length = len(loaded.token_ids)
    assert isinstance(conversation_rows(tokenizer, "plain", length)(item, "train"), dict)
    assert conversation_rows(tokenizer, "plain", length - 1)(item, "train").rule == "too_long"


def test_a_template_that_would_teach_more_than_the_answer_is_noticed(conversation, make_tokenizer):
    finish = conversation_rows(make_tokenizer(LOOSE), "plain", 500)
    found = finish(conversation("What is 2+3?", "It is 5."), "train")
    assert found.rule == "template"
    assert found.why == "turn 0 would teach 'It is 5. -- signed', wanted 'It is 5.'"


def test_a_template_that_refuses_is_a_reason_too(make_item, conversation, make_tokenizer):
    refusing = make_tokenizer("{{ raise_exception('no such role') }}")
    assert "no such role" in prompt_rows(refusing, "plain", 500)(make_item(), "train").why
    found = conversation_rows(refusing, "plain", 500)(conversation("a", "b"), "train")
    assert (found.rule, "no such role" in found.why) == ("template", True)


def test_screens_keep_the_order_and_grade_what_the_rules_have_left(make_item):
    items = [
        make_item("Prove it.", "5"),
        make_item("What is it?", "5", r"\boxed{6}"),
        make_item("What is it now?", "5", r"\boxed{5}"),
        make_item("Is it?", "yes"),
    ]
    found = prompt_screen(refuse, drop_yes_no=True)(items)
    assert [f.rule if isinstance(f, Dropped) else None for f in found] == [
        "proof",
        "unmatched",
        None,
        "yes_no",
    ]
    assert found[2] is items[2]


def test_conversations_need_no_ground_truth_but_are_held_to_the_one_they_have(make_item):
    items = [make_item("Prove it.", "", "QED"), make_item("What?", "5", r"\boxed{6}")]
    found = conversation_screen(refuse)(items)
    assert found[0] is items[0]
    assert found[1].rule == "unmatched"
