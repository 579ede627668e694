"""The table covers the model, in Megatron's names and in Transformer Engine's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_prime.families import MODEL_TYPES
from megatron_prime.weights.names import entries, hf_shapes, parameters_by_entry
from megatron_prime.weights.shape import ModelShape

UNTIED = ModelShape("qwen2", 16, 4, 4, 2, 4, 8, 5, 16, 64, 1e-6, 1e4, True, False)
TIED = ModelShape("qwen2", 16, 4, 4, 2, 4, 8, 5, 16, 64, 1e-6, 1e4, True, True)


class Stage(torch.nn.Module):
    """The last of two stages of two layers, as a list of named parameters."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.decoder = SimpleNamespace(
            layers=[SimpleNamespace(layer_number=3), SimpleNamespace(layer_number=4)]
        )
        self.named = [(name, torch.nn.Parameter(torch.zeros(1))) for name in names]

    def named_parameters(self):  # type: ignore[override]
        return iter(self.named)


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("shape", [UNTIED, TIED])
def test_the_names_are_those_of_transformers(shape: ModelShape, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = replace(shape, family=family)
    config = AutoConfig.for_model(
        family,
        head_dim=4,
        vocab_size=5,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=shape.tied_embeddings,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_shapes(shape) == theirs


def test_no_name_twice() -> None:
    megatron = [entry.megatron for entry in entries(UNTIED)]
    assert len(set(megatron)) == len(megatron)
    assert len(megatron) == 4 * 7 + 3


@pytest.mark.parametrize(
    ("local", "entry_name"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.3.mlp.linear_fc2.weight"),
        (
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.2.input_layernorm.weight",
        ),
        (
            "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.3.pre_mlp_layernorm.weight",
        ),
        ("output_layer.weight", "output_layer.weight"),
    ],
)
def test_local_names_lead_to_the_table(local: str, entry_name: str) -> None:
    ((entry, _, is_copy),) = parameters_by_entry([Stage([local])], UNTIED)
    assert entry.megatron == entry_name
    assert not is_copy


def test_a_tied_output_layer_is_a_copy_of_the_embedding() -> None:
    ((entry, _, is_copy),) = parameters_by_entry([Stage(["output_layer.weight"])], TIED)
    assert entry.hf == ("model.embed_tokens.weight",)
    assert is_copy


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(KeyError, match="router"):
        list(parameters_by_entry([Stage(["decoder.layers.0.mlp.router.weight"])], UNTIED))
