"""What `[megatron]` may and may not say, and that the traps stay shut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_prime.config import ConfigError
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.weights.shape import ModelShape

before_megatron_import()
architecture = pytest.importorskip("megatron_prime.models.architecture")
from megatron_prime.models.torch_spec import TorchAttention  # noqa: E402

SHAPE = ModelShape(
    family="qwen2",
    hidden_size=64,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=96,
    vocab_size=61,
    padded_vocab_size=64,
    max_positions=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=True,
    tied_embeddings=False,
)


def config_of(shape: ModelShape = SHAPE, precision: Any = "fp32", **megatron: Any) -> Any:
    return architecture.transformer_config(shape, precision, megatron)


def test_the_shape_arrives() -> None:
    config = config_of(precision="bf16")
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 2, 8)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert config.layernorm_epsilon == 1e-5
    assert config.add_qkv_bias
    assert not config.add_bias_linear
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16
    assert config.bf16


def test_options_pass_through() -> None:
    config = config_of(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2
    )
    assert config.recompute_num_layers == 2


@pytest.mark.parametrize(
    ("megatron", "told"),
    [
        ({"tensor_paralel_size": 2}, "megatron.tensor_paralel_size: Megatron's TransformerConfig"),
        ({"hidden_size": 64}, "megatron.hidden_size: it comes from the model's config.json"),
        ({"bf16": True}, "megatron.bf16: it comes from the model's config.json or [model]"),
        ({"attention_dropout": 0.1}, "megatron.attention_dropout: found 0.1, wanted 0.0"),
        ({"context_parallel_size": 2}, "megatron.context_parallel_size: found 2, wanted 1"),
        ({"calculate_per_token_loss": True}, "megatron.calculate_per_token_loss: found True"),
        ({"tensor_model_parallel_size": 4}, "4 does not divide the model's 2 key/value heads"),
        ({"recompute_granularity": "full"}, "[megatron]: Megatron refuses these options"),
    ],
)
def test_refusals_name_the_option(megatron: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**megatron)
    assert told in str(error.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        config_of(replace(SHAPE, num_kv_heads=8), nonsense=1, hidden_size=3, hidden_dropout=0.5)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU options")
def test_no_fused_kernel_and_no_overlapped_sends_on_a_cpu() -> None:
    config = config_of(overlap_p2p_comm=True, bias_activation_fusion=True, batch_p2p_comm=True)
    assert not config.overlap_p2p_comm  # with deallocate_pipeline_outputs: wrong losses over gloo
    assert not config.batch_p2p_comm
    assert not config.bias_activation_fusion
    assert config.deallocate_pipeline_outputs
    assert config.variable_seq_lengths


def test_attention_by_hand_and_without_masks() -> None:
    torch.manual_seed(0)
    attention = TorchAttention(config_of())
    q, k, v = torch.randn(5, 2, 8, 8), torch.randn(5, 2, 2, 8), torch.randn(5, 2, 2, 8)
    found = attention(q, k, v, None)
    for row, head in ((0, 0), (1, 3), (0, 7)):  # query heads 0-3 share key head 0, 4-7 key head 1
        scores = q[:, row, head] @ k[:, row, head // 4].T / 8**0.5
        causal = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        wanted = causal.softmax(-1) @ v[:, row, head // 4]
        torch.testing.assert_close(found[:, row, head * 8 : head * 8 + 8], wanted)
    with pytest.raises(ValueError, match="causal only"):
        attention(q, k, v, torch.ones(5, 5, dtype=torch.bool))
