"""Transformer layers of plain torch: what Megatron builds where there is no Transformer Engine.

Megatron's own local layers serve, but for two modules. Its torch RMSNorm refuses sequence
parallelism, which needs no more than a mark on the weight (its gradient is then summed over the
tensor-parallel ranks). Its attention keeps the whole score matrix and forks a CUDA random state;
torch's fused attention does neither.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchRMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension, in the parameters' type."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.to(torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchAttention(MegatronModule):
    """Causal grouped-query attention by `scaled_dot_product_attention`.

    Rows must be padded on the right if at all: a causal mask then hides the padding from every
    real token, and no other mask is needed or accepted.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,  # [S, b, heads, d]
        key: Tensor,  # [S, b, kv heads, d]
        value: Tensor,  # [S, b, kv heads, d]
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend; returns [S, b, heads * d]. ValueError for anything but plain causal attention."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params:
            raise ValueError("TorchAttention is causal only: wanted no mask, bias or packing")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def torch_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """This pipeline stage's layers and the final norm."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = TorchRMSNorm
    layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    layer.submodules.self_attention.submodules.core_attention = TorchAttention
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=TorchRMSNorm
    )
