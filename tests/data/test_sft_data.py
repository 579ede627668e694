import pytest

from megatron_prime.data.chat import Message, TokenizerError, encode_conversation
from megatron_prime.data.rows import DataError
from megatron_prime.data.sft_data import SftExample, load_conversations


def row(answer, role="assistant"):
    return {
        "messages": [{"role": "user", "content": "1+1="}, {"role": role, "content": answer}],
        "source": "ignored",
    }


def test_rows_become_examples_and_long_ones_are_dropped(write_jsonl, tokenizer):
    def example(answer):
        messages = [Message("user", "1+1="), Message("assistant", answer)]
        return SftExample(*encode_conversation(tokenizer, messages))

    path = write_jsonl([row("2"), row("two, I think"), row("3")])
    limit = len(example("2").token_ids)
    loaded = load_conversations(path, tokenizer, limit)
    assert loaded.examples == (example("2"), example("3"))
    assert loaded.dropped_long == 1
    assert loaded.examples[0].loss_mask[-2:] == (True, True)
    assert sum(loaded.examples[0].loss_mask) == 2
    with pytest.raises(DataError, match=r"found 3 conversations.*raise sft.max_length"):
        load_conversations(path, tokenizer, limit - 1)


def test_malformed_rows_are_reported_at_once(write_jsonl, tokenizer):
    path = write_jsonl([row("2"), {"text": "2"}, row("2", role="user"), row("")])
    with pytest.raises(DataError) as error:
        load_conversations(path, tokenizer, 100)
    assert str(error.value).splitlines() == [
        f"{path}: malformed rows: 3",
        "  line 2: messages: found nothing, wanted a non-empty list",
        "  line 3: found the roles ['user', 'user'], wanted others first and the assistant last",
        "  line 4: messages[1]: content: found '', wanted a non-empty str",
    ]


def test_the_tokenizer_is_checked_before_the_rows(write_jsonl, make_tokenizer):
    with pytest.raises(TokenizerError):
        load_conversations(write_jsonl([{}]), make_tokenizer(eos_token=None), 100)
