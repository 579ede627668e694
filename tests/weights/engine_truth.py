"""SGLang's parameters of one rank, cut by hand out of a whole checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.shape import ModelShape


def random_checkpoint(shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """A tensor of distinct values for every name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in hf_shapes(shape).items()}


def sglang_parameters(
    hf: dict[str, Tensor], shape: ModelShape, tp: int, rank: int
) -> dict[str, Tensor]:
    """What rank `rank` of `tp` holds: fused, repeated, padded."""
    found: dict[str, Tensor] = {}

    def share(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(tp, dim)[rank]

    def kv(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (shape.num_kv_heads, -1))
        if tp > shape.num_kv_heads:
            return heads[rank // (tp // shape.num_kv_heads)]
        return heads.chunk(tp)[rank].flatten(0, 1)

    def vocabulary(tensor: Tensor) -> Tensor:
        rows = -(-shape.vocab_size // 64) * 64
        if rows % tp:
            rows = -(-shape.vocab_size // (64 * tp)) * 64 * tp
        padding = tensor.new_zeros(rows - shape.vocab_size, tensor.shape[1])
        return share(torch.cat([tensor, padding]))

    found["model.embed_tokens.weight"] = vocabulary(hf["model.embed_tokens.weight"])
    found["model.norm.weight"] = hf["model.norm.weight"]
    if not shape.tied_embeddings:
        found["lm_head.weight"] = vocabulary(hf["lm_head.weight"])
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}."
        for part in ("weight", "bias"):
            q, k, v = (f"{layer}self_attn.{x}_proj.{part}" for x in "qkv")
            if q in hf:
                fused = torch.cat([share(hf[q]), kv(hf[k]), kv(hf[v])])
                found[f"{layer}self_attn.qkv_proj.{part}"] = fused
        gate, up = (share(hf[f"{layer}mlp.{x}_proj.weight"]) for x in ("gate", "up"))
        found[f"{layer}mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"{layer}{name}.weight"] = share(hf[f"{layer}{name}.weight"], 1)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
        ):
            if f"{layer}{name}.weight" in hf:
                found[f"{layer}{name}.weight"] = hf[f"{layer}{name}.weight"]
    return found
