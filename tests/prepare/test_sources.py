import json

import pytest

from megatron_prime.data.chat import CODE_SUFFIX, MATH_SUFFIX, Message
from megatron_prime.data.rows import DataError, RowError
from megatron_prime.prepare import sources
from megatron_prime.prepare.sources import RL_FORMATS, SFT_FORMATS, detect, items

EURUS = {
    "data_source": "numina_amc_aime",
    "prompt": [
        {"role": "system", "content": "long"},
        {"role": "user", "content": "What is 1+1?" + MATH_SUFFIX},
    ],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 7},
}
NUMINA = {"problem": " What is 1+1? ", "solution": r"It is $\boxed{2}$.", "source": "cn_k12"}
TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}
APPS = {"question": "Add one.", "input_output": json.dumps(TESTS), "starter_code": ""}


@pytest.mark.parametrize(
    ("row", "formats", "name"),
    [
        (EURUS, RL_FORMATS, "eurus"),
        (NUMINA, RL_FORMATS, "numina"),
        ({"problem": "p", "answer": "1"}, RL_FORMATS, "numina"),
        (APPS, RL_FORMATS, "code"),
        ({"messages": []}, SFT_FORMATS, "chat"),
        ({"conversations": []}, SFT_FORMATS, "chat"),
        (NUMINA, SFT_FORMATS, "solved"),
    ],
)
def test_a_format_is_known_by_its_fields_even_behind_a_broken_line(tmp_path, row, formats, name):
    path = tmp_path / "a.jsonl"
    path.write_text('{"broken\n' + json.dumps(row) + "\n")
    assert detect(path, formats) == name


def test_an_unknown_format_is_told_with_those_that_are_known(write_jsonl):
    with pytest.raises(
        DataError, match=r"found the fields \['q'\].*numina: problem\+sol.*--format"
    ):
        detect(write_jsonl([{"q": 1}]), RL_FORMATS)


def test_eurus_rows_keep_their_messages_and_lose_the_suffix_from_the_text():
    parsed = sources.eurus(EURUS, "stem")
    assert parsed["text"] == "What is 1+1?"
    assert parsed["messages"][1].content.endswith(MATH_SUFFIX)
    assert (parsed["source"], parsed["ground_truth"]) == ("numina_amc_aime", "2")
    code = {**EURUS, "ability": "code", "prompt": [{"role": "user", "content": f"Do{CODE_SUFFIX}"}]}
    assert sources.eurus(code, "stem")["text"] == "Do"


def test_an_empty_ground_truth_is_left_to_the_rules():
    for empty in (None, ""):
        row = {**EURUS, "reward_model": {"style": "rule", "ground_truth": empty}}
        assert sources.eurus(row, "stem")["ground_truth"] == ""
    assert sources.numina({"problem": "p", "solution": "none boxed"}, "s")["ground_truth"] == ""
    for empty in (None, "", {}):
        assert sources.code({**APPS, "input_output": empty}, "s")["ground_truth"] == ""


def test_numina_takes_the_answer_or_else_the_last_box():
    parsed = sources.numina(NUMINA, "stem")
    assert (parsed["source"], parsed["ground_truth"]) == ("numina_cn_k12", "2")
    assert parsed["messages"] == (Message("user", "What is 1+1?"),)
    given = sources.numina({"problem": "p", "solution": None, "answer": 3.5}, "amc")
    assert (given["source"], given["ground_truth"], given["solution"]) == ("amc", "3.5", None)


def test_code_tests_may_be_an_object_and_the_function_is_named():
    parsed = sources.code({**APPS, "input_output": TESTS}, "apps")
    assert json.loads(parsed["ground_truth"]) == TESTS
    assert parsed["messages"][0].content == "Add one."
    named = sources.code({**APPS, "fn_name": "inc"}, "apps")
    assert json.loads(named["ground_truth"]) == {**TESTS, "fn_name": "inc"}
    assert named["messages"][0].content == "Add one.\n\nName the function `inc`."
    started = sources.code({**APPS, "starter_code": "def inc(x):"}, "apps")
    assert "```python\ndef inc(x):\n```" in started["messages"][0].content
    assert started["text"] == "Add one."


def test_conversations_of_both_spellings():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    parsed = sources.chat({"conversations": turns, "source": "x"}, "s")
    assert parsed["messages"] == (Message("user", "hi"), Message("assistant", "ho"))
    assert (parsed["text"], parsed["source"]) == ("hi\nho", "x")
    solved = sources.solved({**NUMINA, "answer": "2"}, "s")
    assert [m.role for m in solved["messages"]] == ["user", "assistant"]
    assert solved["ground_truth"] == "2"


@pytest.mark.parametrize(
    ("parser", "row", "message"),
    [
        (sources.eurus, {**EURUS, "prompt": "text"}, "prompt: found 'text'"),
        (sources.eurus, {**EURUS, "ability": "art"}, "ability: found 'art'"),
        (sources.eurus, {**EURUS, "reward_model": {"style": "model"}}, "reward_model.style"),
        (sources.numina, {"problem": "p"}, "found neither it nor an answer"),
        (sources.numina, {"problem": "p", "answer": [1]}, r"answer: found \[1\]"),
        (sources.code, {**APPS, "input_output": "{"}, "input_output: found no JSON"),
        (sources.code, {**APPS, "input_output": "[1]"}, "input_output: found a list"),
        (sources.chat, {"conversations": [{"from": "me"}]}, r"conversations\[0\]"),
        (sources.chat, {"messages": [{"role": "user", "content": "a"}]}, "found the roles"),
    ],
)
def test_malformed_rows(parser, row, message):
    with pytest.raises(RowError, match=message):
        parser(row, "stem")


def test_half_a_character_makes_a_row_malformed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"problem": "\\ud83d", "answer": "1"}\n{"problem": "\\ud83d\\ude00", "answer": "1"}'
    )
    first, second = (item for _, _, item in items(path, sources.numina))
    assert isinstance(first, RowError)
    assert "half a character, '\\ud83d'" in str(first)
    assert second.text == "😀"


def test_items_carry_their_place(tmp_path):
    path = tmp_path / "numina.jsonl"
    path.write_text(json.dumps(NUMINA) + "\n\nno json\n" + json.dumps(NUMINA) + "\n")
    found = list(items(path, sources.numina))
    assert [(number, place) for number, place, _ in found] == [
        (0, "numina.jsonl line 1"),
        (2, "numina.jsonl line 3"),
        (3, "numina.jsonl line 4"),
    ]
    assert isinstance(found[1][2], RowError)
    assert found[2][2].place == "numina.jsonl line 4"
