import pytest
from byte_tokenizer import make_tokenizer, tokenizer, write_jsonl  # noqa: F401

from megatron_prime.data.chat import Message
from megatron_prime.prepare.items import Item


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
