"""A tiny random Qwen2, its config on disk, a tokenizer of the alphabet, an engine of all three."""

from __future__ import annotations

import json

import pytest
import torch
from given import Given
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_prime.rollout.local_engine import LocalEngine
from megatron_prime.types import Prompt

EOS = 1


class AlphabetTokenizer:
    """Token n is the character with code point 32 + n; token 1 ends a response."""

    eos_token_id = EOS

    def decode(self, token_ids, *, skip_special_tokens):
        shown = [token for token in token_ids if not (skip_special_tokens and token == EOS)]
        return "".join(chr(32 + token) for token in shown)


@pytest.fixture(params=[True, False], ids=["tied", "untied"], scope="session")
def tied(request):
    return request.param


@pytest.fixture(scope="session")
def model(tied):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen2(tie_word_embeddings=tied)).eval()
    for parameter in model.parameters():  # ten times the usual spread, or all logits look alike
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def qwen2(**changes):
    return Qwen2Config(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "eos_token_id": EOS,
            **changes,
        }
    )


@pytest.fixture(scope="session")
def hf_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


@pytest.fixture
def make_engine(hf_dir):
    def make(rank=0, world_size=1, batch_size=64, dtype="fp32"):
        return LocalEngine(hf_dir, rank, world_size, dtype, batch_size, AlphabetTokenizer(), "cpu")

    return make


@pytest.fixture
def engine(make_engine, model):
    engine = make_engine()
    engine.load_weights(Given(model.named_parameters()), version=3)
    return engine


@pytest.fixture(scope="session")
def prompts():
    """Seven prompts of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(7)
    return [
        Prompt(
            100 + n,
            tuple(torch.randint(2, 64, (length,), generator=generator).tolist()),
            "0",
            "math",
            "test",
        )
        for n, length in enumerate((3, 9, 1, 4, 4, 7, 2))
    ]
