import json

import pytest

from megatron_prime.data.chat import Message
from megatron_prime.prepare.items import Item

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Byte-level tokenizers, one token per ASCII character, with a chat template of one's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(chat_template=CHATML):
        special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = {token: i for i, token in enumerate([*special, *alphabet])}
        tokenizer = Tokenizer(models.BPE(tokens, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=chat_template
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def make_item():
    """An item of which a test says what it is about."""

    def make(
        text="What is 2+3?", truth="5", solution=None, ability="math", number=0, file="a.jsonl"
    ):
        place = f"{file} line {number + 1}"
        messages = (Message("user", text),)
        return Item(file, number, place, "here", ability, messages, text, truth, solution)

    return make


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
