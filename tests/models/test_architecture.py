"""What `[megatron]` may and may not say, and that the traps stay shut."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from megatron_prime.config import ConfigError, PrecisionOptions
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.weights.shape import ModelShape

before_megatron_import()
architecture = pytest.importorskip("megatron_prime.models.architecture")
from megatron.core.models.common.embeddings.rotary_pos_embedding import (  # noqa: E402
    RotaryEmbedding,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_prime.models.packed_attention import Pack, attend  # noqa: E402
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
    return architecture.transformer_config(shape, PrecisionOptions(dtype=precision), megatron)


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
        ({"bf16": True}, "megatron.bf16: it comes from the model's config.json or [precision]"),
        ({"attention_dropout": 0.1}, "megatron.attention_dropout: found 0.1, wanted 0.0"),
        ({"variable_seq_lengths": True}, "megatron.variable_seq_lengths: found True, wanted False"),
        ({"calculate_per_token_loss": True}, "megatron.calculate_per_token_loss: found True"),
        ({"tensor_model_parallel_size": 4}, "4 does not divide the model's 2 key/value heads"),
        ({"recompute_granularity": "full"}, "[megatron]: Megatron refuses these options"),
    ],
)
def test_refusals_name_the_option(megatron: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**megatron)
    assert told in str(error.value)


def test_what_would_change_the_mathematics_is_refused() -> None:
    """Megatron's own default of each option is the value that is wanted."""
    defaults = {field.name: field.default for field in fields(TransformerConfig)}
    ours = ("hidden_dropout", "attention_dropout")
    for option, wanted in architecture.FIXED.items():
        assert option in ours or defaults[option] == wanted
        with pytest.raises(ConfigError, match=rf"megatron.{option}: found 'x', wanted"):
            config_of(**{option: "x"})


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        config_of(replace(SHAPE, num_kv_heads=8), nonsense=1, hidden_size=3, hidden_dropout=0.5)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU options")
def test_no_fused_kernel_and_no_overlapped_sends_on_a_cpu() -> None:
    config = config_of(bias_activation_fusion=True, batch_p2p_comm=True)
    assert not config.overlap_p2p_comm  # with deallocate_pipeline_outputs: wrong losses over gloo
    with pytest.raises(ConfigError, match="overlap_p2p_comm: found true without CUDA"):
        config_of(overlap_p2p_comm=True)
    assert not config.batch_p2p_comm
    assert not config.bias_activation_fusion
    assert config.deallocate_pipeline_outputs


def turned(x: torch.Tensor) -> torch.Tensor:
    """RoPE by complex numbers: pair i of position p turns by p / 50^(2i / 8)."""
    at = torch.tensor([0, 1, 0, 1, 2])
    angles = at[:, None] * 50.0 ** -(torch.arange(4) / 4)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def test_attention_wants_a_pack_and_nothing_else() -> None:
    rope = RotaryEmbedding(8, 1.0, rotary_base=50, use_cpu_initialization=True)
    attention = TorchAttention(config_of(), rope)
    q, k = torch.randn(5, 8, 8), torch.randn(5, 2, 8)
    pack = Pack.of([2, 3], 0, 1, torch.device("cpu"))
    wanted = attend(turned(q), turned(k), k, pack, 8**-0.5)
    torch.testing.assert_close(attention(q, k, k, None, packed_seq_params=pack), wanted)
    with pytest.raises(ValueError, match="wanted a Pack"):
        attention(q, k, k, None)
    with pytest.raises(ValueError, match="no mask"):
        attention(q, k, k, torch.ones(5, 5, dtype=torch.bool), packed_seq_params=pack)
