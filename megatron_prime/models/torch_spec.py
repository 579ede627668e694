"""Transformer layers of plain torch: what Megatron builds where there is no Transformer Engine.

Megatron's own local layers serve, but for two modules. Its torch RMSNorm refuses sequence
parallelism, which needs no more than a mark on the weight (its gradient is then summed over the
tensor-parallel ranks). Its attention knows neither packs nor context parallelism, and keeps the
whole score matrix; `packed_attention.py` has torch's fused attention do the work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prime.models.packed_attention import Pack, attend, rotate


class TorchRMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension, in the parameters' type."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.to(torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchAttention(MegatronModule):
    """RoPE and causal grouped-query attention within the sequences of a pack.

    RoPE is here and not in Megatron's own place before it, which computes the same cosines in each
    layer anew.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rope: RotaryEmbedding,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.inv_freq = rope.inv_freq
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,  # [S, heads, d], this context-parallel rank's
        key: Tensor,  # [S, kv heads, d]
        value: Tensor,  # [S, kv heads, d]
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Pack | None = None,
    ) -> Tensor:
        """Attend; returns [S, heads * d]. ValueError without a pack, or with a mask or a bias."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params is None:
            raise ValueError("TorchAttention attends within packs: wanted a Pack, no mask, no bias")
        rotation = packed_seq_params.rotation(self.inv_freq, query.dtype)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if packed_seq_params.cp_size > 1:
            key, value = (
                gather_from_sequence_parallel_region(x, group=get_context_parallel_group())
                for x in (key, value)
            )
        return attend(query, key, value, packed_seq_params, self.scale)


def torch_block_spec(
    config: TransformerConfig, rope: RotaryEmbedding, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """This pipeline stage's layers and the final norm; the model itself must have no RoPE."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = TorchRMSNorm
    layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(TorchAttention, params={"rope": rope})
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=TorchRMSNorm
    )
