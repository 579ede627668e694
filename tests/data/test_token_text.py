"""The text of each token, of tokenizers that split characters and words."""

from __future__ import annotations

import pytest

from megatron_prime.data.token_text import pieces

TEXTS = ["2+2=4", "é", "naïve → ∑ 😀", "  two  spaces\n\n", "中文，😀😀", "�"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_character_belong_to_the_token_that_completes_it(tokenizer, text):
    """The tokenizer has one token a byte."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    found = pieces(ids, tokenizer)
    wanted = [part for char in text for part in [""] * (len(char.encode()) - 1) + [char]]
    assert found == wanted


def test_a_response_cut_within_a_character_keeps_its_length(tokenizer):
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    found = pieces(ids, tokenizer)
    assert len(found) == 4
    assert "".join(found) == tokenizer.decode(ids)


def test_special_tokens_have_no_text(tokenizer):
    ids = [*tokenizer.encode("ab", add_special_tokens=False), tokenizer.eos_token_id]
    assert pieces(ids, tokenizer) == ["a", "b", ""]


def test_a_decoder_that_drops_the_first_words_space():
    """SentencePiece's: a word's space is text only behind another word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁cat", "s", "▁", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    found = pieces([0, 1, 2, 0], fast)
    assert found == ["the", " cat", "s", " the"]
    assert "".join(found) == fast.decode([0, 1, 2, 0])
