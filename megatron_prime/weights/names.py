"""One map of names: which Hugging Face tensors make up which Megatron parameter, and how.

Loading, the reshard of every step and the export all read this table; none of them knows a name.
A family is data: a tuple of `Entry` for one layer and one for what stands outside the layers.
Transformer Engine fuses each norm into the linear layer behind it and names it after that layer;
`_TE_NAMES` leads those names back to the ones in the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_prime.weights.layout import Layout
from megatron_prime.weights.shape import ModelShape

if TYPE_CHECKING:  # the converters do without torch
    import torch


@dataclass(frozen=True, slots=True)
class Entry:
    """A Megatron parameter of the whole model and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


_LLAMA_LAYER = (
    Entry("input_layernorm.weight", ("input_layernorm.weight",), Layout.WHOLE),
    Entry(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        Layout.QKV,
    ),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Layout.COLUMNS),
    Entry("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Layout.WHOLE),
    Entry("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Layout.GATE_UP),
    Entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Layout.COLUMNS),
)
_QKV_BIAS = Entry(
    "self_attention.linear_qkv.bias",
    ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    Layout.QKV,
)
_QK_NORMS = (
    Entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Layout.WHOLE),
    Entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Layout.WHOLE),
)
_EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.VOCAB)
_FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.WHOLE)
_OUTPUT = Entry("output_layer.weight", ("lm_head.weight",), Layout.VOCAB)
# As transformers' models for sequence classification have it; every tensor-parallel rank has it.
VALUE_HEAD = Entry("output_layer.weight", ("score.weight",), Layout.WHOLE)

_LAYERS = {  # by ModelShape.family
    "llama": _LLAMA_LAYER,
    "mistral": _LLAMA_LAYER,
    "qwen2": (*_LLAMA_LAYER, _QKV_BIAS),
    "qwen3": (*_LLAMA_LAYER, *_QK_NORMS),
}

_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


_DISK_NAMES = {name: te_name for te_name, name in _TE_NAMES.items()}


def entries(shape: ModelShape) -> list[Entry]:
    """All parameters of the whole model, in the order of its layers."""
    layers = [
        replace(
            entry,
            megatron=f"decoder.layers.{i}.{entry.megatron}",
            hf=tuple(f"model.layers.{i}.{name}" for name in entry.hf),
        )
        for i in range(shape.num_layers)
        for entry in _LAYERS[shape.family]
    ]
    output = VALUE_HEAD if shape.value_head else _OUTPUT
    return [_EMBEDDING, *layers, _FINAL_NORM, *([] if shape.tied_embeddings else [output])]


def parameters_by_entry(
    chunks: Sequence[torch.nn.Module], shape: ModelShape
) -> Iterator[tuple[Entry, torch.nn.Parameter, bool]]:
    """This rank's parameters, the entry of each, and whether it is a copy of another stage's.

    The only copy is the tied output layer of a last pipeline stage that is not the first.
    Raises KeyError for a parameter that has no entry.
    """
    by_name = {entry.megatron: entry for entry in entries(shape)}
    if shape.tied_embeddings:
        by_name[_OUTPUT.megatron] = _EMBEDDING
    for chunk in chunks:
        for local_name, parameter in chunk.named_parameters():
            name = _global_name(chunk, local_name)
            is_copy = shape.tied_embeddings and name == _OUTPUT.megatron
            yield by_name[name], parameter, is_copy


def _global_name(model: Any, local_name: str) -> str:
    """The name in the table: layers counted over all pipeline stages, TE's names led back."""
    if not local_name.startswith("decoder.layers."):
        return local_name
    _, _, local_layer, rest = local_name.split(".", 3)
    layer = model.decoder.layers[int(local_layer)].layer_number - 1
    return f"decoder.layers.{layer}.{_TE_NAMES.get(rest, rest)}"


def disk_key(name: str) -> tuple[str, int | None]:
    """Where Megatron's distributed checkpoints keep a parameter: the key, and the index in it.

    The layers' parameters are stacked under one key, and norms go by Transformer Engine's names.
    """
    if not name.startswith("decoder.layers."):
        return name, None
    _, _, layer, rest = name.split(".", 3)
    return f"decoder.layers.{_DISK_NAMES.get(rest, rest)}", int(layer)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's Hugging Face checkpoint and its shape."""
    hidden, ffn = shape.hidden_size, shape.ffn_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    of_layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.q_norm.weight": (shape.head_dim,),
        "self_attn.k_norm.weight": (shape.head_dim,),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    outside = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab_size, hidden),
        "score.weight": (1, hidden),
    }
    return {
        name: outside[name] if name in outside else of_layer[name.split(".", 3)[3]]
        for entry in entries(shape)
        for name in entry.hf
    }
