import hashlib
import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_prime.data.chat import Message, encode_conversation, encode_prompt, load_tokenizer
from megatron_prime.data.prompts import load_prompts
from megatron_prime.data.sft_data import load_conversations
from megatron_prime.verify.math_answer import boxed_answer, grade

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    script.main(["--out", str(folder), "--train", "300", "--test", "200", "--sft", "3000"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(out):
    return load_tokenizer(out / "model")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trace_without_slips_is_right_and_one_with_all_of_them_drops_every_carry(script):
    digits = [8, 7, 6, 5, 9]
    assert script.question(digits) == "8+7+6+5+9="
    clean = script.trace(digits, 0.0, random.Random(0))
    assert clean == r"8+7=15,15+6=21,21+5=26,26+9=35,\boxed{35}"
    sloppy = script.trace(digits, 1.0, random.Random(0))
    assert sloppy == r"8+7=5,5+6=1,1+5=6,6+9=5,\boxed{5}"


def test_half_of_the_carries_are_forgotten_and_nothing_else_is_wrong(out):
    carries = forgotten = 0
    for row in rows(out / "sft.jsonl"):
        total = None
        for a, b, result in re.findall(r"(\d+)\+(\d)=(\d+)", row["messages"][1]["content"]):
            a, b, result = int(a), int(b), int(result)
            assert total is None or a == total, "the trace goes on from the total it wrote"
            if a % 10 + b >= 10:
                carries += 1
                forgotten += result == a + b - 10
                assert result in (a + b, a + b - 10)
            else:
                assert result == a + b
            total = result
        assert boxed_answer(row["messages"][1]["content"]) == str(total)
    assert carries > 4000
    assert abs(forgotten / carries - 0.5) < 0.03


def test_no_problem_stands_in_two_files_or_twice(out):
    questions = [row["messages"][0]["content"] for row in rows(out / "sft.jsonl")]
    for name in ("train", "test"):
        questions += [row["prompt"][0]["content"] for row in rows(out / f"{name}.jsonl")]
    assert len(set(questions)) == len(questions) == 3500


def test_the_project_reads_the_prompts_and_their_truth_is_the_sum(out, tokenizer):
    for name, count in (("train", 300), ("test", 200)):
        loaded = load_prompts(out / f"{name}.jsonl", tokenizer, "plain", 32)
        assert len(loaded.prompts) == count
        for prompt in loaded.prompts:
            text = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
            assert re.fullmatch(r"[1-9](\+[1-9]){4}=", text)
            assert str(sum(map(int, re.findall(r"\d", text)))) == prompt.ground_truth
            assert (prompt.ability, prompt.data_source) == ("math", "chain_addition")


def test_the_project_reads_the_conversations_and_few_are_right(out, tokenizer):
    loaded = load_conversations(out / "sft.jsonl", tokenizer, 128)
    assert len(loaded.examples) == 3000
    right = 0
    for example in loaded.examples:
        prompt = tokenizer.decode(example.token_ids[: example.loss_mask.index(True)])
        answer = tokenizer.decode(example.token_ids)
        right += grade(answer, str(sum(map(int, re.findall(r"\d", prompt)))))
    assert 0.2 < right / 3000 < 0.45


def test_the_tokenizer_spells_text_letter_by_letter_and_back(tokenizer):
    text = "8+7=15,15+6=21,\\boxed{21}\n (a - b) 12  xyz\n\n."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 64
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_conversation_is_the_prompt_the_answer_and_the_end(tokenizer):
    user, answer = Message("user", "1+2="), Message("assistant", r"1+2=3,\boxed{3}")
    ids, mask = encode_conversation(tokenizer, [user, answer])
    assert tokenizer.decode(ids) == r"1+2=1+2=3,\boxed{3}<eos>"
    assert ids[:4] == encode_prompt(tokenizer, [user])
    assert mask == (False,) * 4 + (True,) * (len(ids) - 4)
    assert ids[-1] == tokenizer.eos_token_id


def test_the_config_builds_the_model_and_agrees_with_the_tokenizer(out, tokenizer):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(out / "model")
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 4, 512)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert not list((out / "model").glob("*.safetensors"))


def test_the_seed_decides_everything(script, out, tmp_path):
    arguments = ["--train", "300", "--test", "200", "--sft", "3000"]
    script.main(["--out", str(tmp_path / "again"), *arguments])
    script.main(["--out", str(tmp_path / "other"), *arguments, "--seed", "1"])
    for name in ("train.jsonl", "test.jsonl", "sft.jsonl", "model/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert (tmp_path / "other/sft.jsonl").read_bytes() != (out / "sft.jsonl").read_bytes()


# Of `--train 300 --test 200 --sft 3000`: the quickstart's measured figures are of these problems.
DIGESTS = {  # the first half of each SHA-256
    "train.jsonl": "3bbf5260ae6c6b84f26eba7ffa9a3827",
    "test.jsonl": "9952155b69cf608c54f691472a1c71a3",
    "sft.jsonl": "f36a79af5d69bc12cc33c510410b4013",
    "model/tokenizer.json": "3f3130404761b8e8a9d0fc19254b0e9a",
    "model/tokenizer_config.json": "0552f669b275df42e7a4fc80be10e8d5",
    "model/config.json": "64b8325997df360a2846cedfb5949eec",
}


def test_the_default_task_is_the_one_that_was_measured(out):
    for name, digest in DIGESTS.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest()[:32] == digest, name


@pytest.fixture(scope="module")
def mixed(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    skills = ["--skills", "linear,program,chain,modular", "--difficulty", "2"]
    sizes = ["--train", "40", "--test", "20", "--sft", "60"]
    script.main(["--out", str(folder), *skills, *sizes])
    return folder


def test_other_skills_are_mixed_in_equal_shares_and_no_question_comes_twice(mixed):
    made = rows(mixed / "train.jsonl") + rows(mixed / "test.jsonl")
    assert Counter(row["data_source"] for row in made) == {
        "linear_equations": 15,
        "small_programs": 15,
        "chain_addition": 15,
        "modular_arithmetic": 15,
    }
    questions = [row["prompt"][0]["content"] for row in made]
    questions += [row["messages"][0]["content"] for row in rows(mixed / "sft.jsonl")]
    assert len(set(questions)) == len(questions) == 120


def test_chains_grow_with_difficulty_and_their_truth_is_the_sum(script, mixed, tmp_path):
    arguments = ["--train", "20", "--test", "0", "--sft", "20", "--difficulty", "3"]
    script.main(["--out", str(tmp_path), *arguments])
    chains = {7: rows(mixed / "train.jsonl"), 9: rows(tmp_path / "train.jsonl")}
    for terms, made in chains.items():
        for row in made:
            if row["data_source"] == "chain_addition":
                question = row["prompt"][0]["content"]
                assert re.fullmatch(rf"[1-9](\+[1-9]){{{terms - 1}}}=", question)
                truth = sum(map(int, re.findall(r"\d", question)))
                assert row["reward_model"]["ground_truth"] == str(truth)


def test_the_project_reads_the_mixed_rows_and_the_tokenizer_spells_them(mixed):
    tokenizer = load_tokenizer(mixed / "model")
    prompts = load_prompts(mixed / "train.jsonl", tokenizer, "plain", 1000).prompts
    made = rows(mixed / "train.jsonl")
    assert len(prompts) == 40
    for prompt, row in zip(prompts, made, strict=True):
        assert tokenizer.decode(prompt.token_ids) == row["prompt"][0]["content"]
    conversations = load_conversations(mixed / "sft.jsonl", tokenizer, 1000).examples
    for example, row in zip(conversations, rows(mixed / "sft.jsonl"), strict=True):
        learnt = [t for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m]
        assert tokenizer.decode(learnt) == row["messages"][1]["content"] + "<eos>"
    config = json.loads((mixed / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--skills", "chain,poetry"], "found --skills ['poetry']"),
        (["--difficulty", "0"], "found --difficulty 0, wanted 1 or more"),
        (["--skills", "linear", "--train", "90000"], "raise --difficulty, or ask for fewer"),
    ],
)
def test_wrong_arguments_are_told(script, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_more_problems_than_there_are_are_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--sft", "60000"])
    assert "wanted at most 59049" in capsys.readouterr().err
