import copy
import json
import time
from collections import Counter

import pytest

from megatron_prime import protocols
from megatron_prime.data.chat import MATH_SUFFIX, PRIME_SYSTEM_PROMPT, Message, encode_prompt
from megatron_prime.data.prompts import PromptStream, load_prompts
from megatron_prime.data.rows import DataError
from megatron_prime.types import Prompt


def row(question="1+1=", **changes):
    return {
        "data_source": "numina_olympiads",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 3},
    } | changes


def prompts(count, first=0):
    return [Prompt(i, (i, i + 1), str(i), "math", "test") for i in range(first, first + count)]


def ids(taken):
    return [prompt.prompt_id for prompt in taken]


def test_rows_become_prompts(write_jsonl, tokenizer):
    code = row("sum", ability="code", reward_model={"style": "rule", "ground_truth": "{}"})
    loaded = load_prompts(write_jsonl([row(), code]), tokenizer, "plain", 100)
    assert loaded.dropped_long == 0
    assert loaded.prompts == (
        Prompt(
            0, encode_prompt(tokenizer, [Message("user", "1+1=")]), "2", "math", "numina_olympiads"
        ),
        Prompt(
            1, encode_prompt(tokenizer, [Message("user", "sum")]), "{}", "code", "numina_olympiads"
        ),
    )


def test_the_prime_template_is_applied(write_jsonl, tokenizer):
    (prompt,) = load_prompts(write_jsonl([row()]), tokenizer, "prime", 1024).prompts
    assert prompt.token_ids == encode_prompt(
        tokenizer, [Message("system", PRIME_SYSTEM_PROMPT), Message("user", "1+1=" + MATH_SUFFIX)]
    )


def test_parquet_and_jsonl_hold_the_same(write_jsonl, tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [row(f"{i}+{i}=") for i in range(5)]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    from_jsonl = load_prompts(write_jsonl(rows), tokenizer, "prime", 1024)
    assert load_prompts(path, tokenizer, "prime", 1024) == from_jsonl


def test_long_prompts_are_counted_and_dropped_and_the_others_keep_their_numbers(
    write_jsonl, tokenizer
):
    limit = len(encode_prompt(tokenizer, [Message("user", "1234")]))
    path = write_jsonl([row("12345"), row("1234"), row("123456"), row("1")])
    loaded = load_prompts(path, tokenizer, "plain", limit)
    assert loaded.dropped_long == 2
    assert ids(loaded.prompts) == [1, 3]
    with pytest.raises(DataError, match=r"found 4 prompts.*raise data.max_prompt_length"):
        load_prompts(path, tokenizer, "plain", 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt": []}, "prompt: found [], wanted a non-empty list"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "prompt: found 'assistant' as the last role, wanted 'user'",
        ),
        ({"ability": "poetry"}, "ability: found 'poetry', wanted 'math' or 'code'"),
        ({"reward_model": None}, "reward_model: found None, wanted a non-empty dict"),
        (
            {"reward_model": {"style": "model", "ground_truth": "2"}},
            "reward_model.style: found 'model', wanted 'rule'",
        ),
        (
            {"reward_model": {"style": "rule", "ground_truth": 2}},
            "reward_model.ground_truth: found 2, wanted a non-empty str",
        ),
        ({"data_source": ""}, "data_source: found '', wanted a non-empty str"),
    ],
)
def test_malformed_rows_are_reported_with_line_found_and_wanted(
    write_jsonl, tokenizer, changes, problem
):
    path = write_jsonl([row(), row(**changes), row(), row(**changes)])
    with pytest.raises(DataError) as error:
        load_prompts(path, tokenizer, "plain", 100)
    assert str(error.value).splitlines() == [
        f"{path}: malformed rows: 2",
        f"  line 2: {problem}",
        f"  line 4: {problem}",
    ]


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own():
    stream: protocols.PromptStream = PromptStream(prompts(50), seed=3)
    epochs = [ids(stream.take(50)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 5
    other = PromptStream(prompts(50), seed=4)
    assert ids(other.take(50)) != epochs[0]


def draw(stream: PromptStream, count: int) -> list[Prompt]:
    """One at a time, across epochs."""
    return [prompt for _ in range(count) for prompt in stream.take(1)]


def test_the_order_is_the_same_for_ever():
    stream = PromptStream(prompts(6), seed=0)
    assert ids(draw(stream, 12)) == [0, 3, 4, 1, 5, 2, 3, 1, 2, 0, 4, 5]


def test_the_size_of_takes_does_not_matter():
    whole = ids(draw(PromptStream(prompts(7), seed=1), 40))
    stream = PromptStream(prompts(7), seed=1)
    pieces = [prompt for count in (0, 1, 5, 1) * 5 for prompt in stream.take(count)]
    assert ids(pieces) == whole[:35]
    assert set(Counter(whole[:35]).values()) == {5}


def test_what_is_put_back_comes_first_and_in_order():
    stream = PromptStream(prompts(10), seed=1)
    first = draw(stream, 6)
    then = ids(draw(copy.deepcopy(stream), 8))
    stream.put_back(first[4:])
    stream.put_back(first[2:4])
    assert ids(draw(stream, 12)) == ids(first[2:]) + then


def test_resuming_yields_the_same_sequence():
    stream = PromptStream(prompts(9), seed=5)
    stream.put_back(draw(stream, 13)[10:])
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(prompts(9), seed=5)
    resumed.take(4)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == stream.state_dict()
    assert ids(draw(resumed, 50)) == ids(draw(stream, 50))


def test_a_state_at_the_very_end_of_an_epoch_resumes_too():
    stream, resumed = PromptStream(prompts(4), seed=5), PromptStream(prompts(4), seed=5)
    stream.take(4)
    resumed.load_state_dict(stream.state_dict())
    assert ids(draw(resumed, 10)) == ids(draw(stream, 10))


@pytest.mark.parametrize(
    ("data", "seed", "knob"),
    [
        (prompts(8), 5, "data.train"),
        (prompts(9, first=1), 5, "data.train"),
        ([*prompts(8), Prompt(8, (8, 10), "8", "math", "test")], 5, "data.train"),
        ([*prompts(8), Prompt(8, (8, 9), "9", "math", "test")], 5, "data.train"),
        (prompts(9), 6, "run.seed"),
    ],
)
def test_a_state_of_other_data_or_another_seed_is_refused(data, seed, knob):
    state = PromptStream(prompts(9), seed=5).state_dict()
    with pytest.raises(DataError, match=rf"found a checkpoint .* wanted .*restore {knob}"):
        PromptStream(data, seed).load_state_dict(state)


def test_a_stream_needs_prompts():
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], seed=0)


def test_a_large_stream_is_fast():
    data = prompts(100_000)
    started = time.perf_counter()
    PromptStream(data, seed=0).take(100_000)
    assert time.perf_counter() - started < 5


def test_a_take_never_holds_a_prompt_twice() -> None:
    prompts = [Prompt(i, (i,), "1", "math", "test") for i in range(5)]
    stream = PromptStream(prompts, seed=1)
    seen = []
    for _ in range(10):  # 3 does not divide 5: takes cross epochs
        taken = [prompt.prompt_id for prompt in stream.take(3)]
        assert len(set(taken)) == 3
        seen += taken
        stream.put_back([prompts[taken[0]]])
    assert set(seen) == set(range(5))
    with pytest.raises(DataError, match=r"found 5 prompts, wanted 6 .*prompts_per_round"):
        stream.take(6)
