"""Fixtures of tests that read text: a small tokenizer, and rows in a file."""

import json

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Byte-level tokenizers, one token per ASCII character, with a chat template of one's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(chat_template=CHATML, eos_token="<|im_end|>"):
        special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = {token: i for i, token in enumerate([*special, *alphabet])}
        tokenizer = Tokenizer(models.BPE(tokens, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=eos_token, chat_template=chat_template
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
