"""The parameters that one rank holds, from the model's shape and the layout alone.

Pipeline stage p of P holds, with V virtual stages, the V chunks p, p + P, p + 2 P … of the layers.
Tensor parallelism cuts the matrices of a layer and the vocabulary; norms are the same on all its
ranks. The embedding is on the first stage, the final norm and the output layer on the last; a tied
output layer is the embedding itself where both are on one stage, and a second copy of it where not
(megatron/core/models/gpt/gpt_model.py, .../language_module.py). A critic has a value head in its
place, h values that every tensor-parallel rank has. The order is that of Megatron's
`named_parameters`, which decides how gradients are cut into buckets.

    attention  (q + 2 kv) h + q h       q, kv: widths of all query heads and all key or value heads
    SwiGLU     3 h f                    f: feed-forward width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_prime.config import ConfigError, ParallelSizes
from megatron_prime.weights.shape import ModelShape

SGLANG_VOCAB_MULTIPLE = 64  # sglang/srt/layers/vocab_parallel_embedding.py


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter as Megatron allocates it on a rank."""

    name: str
    numel: int
    layer: int | None = None  # of a layer's weight matrix: the number of the layer in the model
    is_shared_embedding: bool = False  # a copy of it is on another stage


def chunks(shape: ModelShape, sizes: ParallelSizes, stage: int) -> list[list[Parameter]]:
    """Parameters of each chunk (one per virtual stage) of a rank in pipeline `stage`.

    All tensor-, context- and data-parallel ranks of a stage hold as many. Raises ConfigError when
    the model can't be cut so.
    """
    _check(shape, sizes)
    parts = sizes.pp * sizes.vpp
    per_chunk = shape.num_layers // parts
    held = []
    for virtual in range(sizes.vpp):
        number = virtual * sizes.pp + stage
        first = number * per_chunk
        layers = range(first, first + per_chunk)
        held.append(list(_chunk(shape, sizes.tp, layers, number == 0, number == parts - 1)))
    return held


def count(shape: ModelShape, sizes: ParallelSizes, stage: int) -> int:
    """Parameters of a rank in pipeline `stage`, all chunks together."""
    return sum(p.numel for chunk in chunks(shape, sizes, stage) for p in chunk)


def layers_of_chunk(shape: ModelShape, sizes: ParallelSizes) -> int:
    """Transformer layers in each chunk."""
    return shape.num_layers // (sizes.pp * sizes.vpp)


def _check(shape: ModelShape, sizes: ParallelSizes) -> None:
    stages = sizes.pp * sizes.vpp
    problems = [
        f"megatron.tensor_model_parallel_size: {sizes.tp} does not divide the model's "
        f"{number} {name}"
        for name, number in {
            "attention heads": shape.num_heads,
            "key/value heads": shape.num_kv_heads,
            "feed-forward units": shape.ffn_size,
        }.items()
        if number % sizes.tp
    ]
    if shape.num_layers % stages:
        problems.append(
            f"megatron.pipeline_model_parallel_size: {stages} stages (virtual ones included) do "
            f"not divide the model's {shape.num_layers} layers"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _chunk(
    shape: ModelShape, tp: int, layers: range, is_first: bool, is_last: bool
) -> Iterator[Parameter]:
    vocabulary = shape.padded_vocab_size // tp * shape.hidden_size
    split_tie = shape.tied_embeddings and not (is_first and is_last)
    if is_first:
        yield Parameter(
            "embedding.word_embeddings.weight", vocabulary, is_shared_embedding=split_tie
        )
    for layer in layers:
        yield from _layer(shape, tp, layer)
    if is_last:
        yield Parameter("decoder.final_layernorm.weight", shape.hidden_size)
        if shape.value_head:
            yield Parameter("output_layer.weight", shape.hidden_size)
        elif split_tie or not shape.tied_embeddings:
            yield Parameter("output_layer.weight", vocabulary, is_shared_embedding=split_tie)


def _layer(shape: ModelShape, tp: int, layer: int) -> Iterator[Parameter]:
    h, f = shape.hidden_size, shape.ffn_size // tp
    q = shape.num_heads * shape.head_dim // tp
    qkv = q + 2 * shape.num_kv_heads * shape.head_dim // tp
    prefix = f"decoder.layers.{layer}"
    yield Parameter(f"{prefix}.input_layernorm.weight", h)
    yield Parameter(f"{prefix}.self_attention.linear_proj.weight", q * h, layer)
    yield Parameter(f"{prefix}.self_attention.linear_qkv.weight", qkv * h, layer)
    if shape.qkv_bias:
        yield Parameter(f"{prefix}.self_attention.linear_qkv.bias", qkv)
    if shape.qk_norm:
        yield Parameter(f"{prefix}.self_attention.q_layernorm.weight", shape.head_dim)
        yield Parameter(f"{prefix}.self_attention.k_layernorm.weight", shape.head_dim)
    yield Parameter(f"{prefix}.pre_mlp_layernorm.weight", h)
    yield Parameter(f"{prefix}.mlp.linear_fc1.weight", 2 * f * h, layer)
    yield Parameter(f"{prefix}.mlp.linear_fc2.weight", f * h, layer)


@dataclass(frozen=True, slots=True)
class EngineCount:
    """What one rank of a rollout server holds, in numbers of values."""

    matrices: int  # of the layers: what `rollout.fp8_weights` rounds
    others: int

    @property
    def all(self) -> int:
        """Both."""
        return self.matrices + self.others


def engine_count(shape: ModelShape, tp: int, multiple: int = SGLANG_VOCAB_MULTIPLE) -> EngineCount:
    """The parameters of one of `tp` ranks of an SGLang server (the same on each).

    Key/value heads are repeated when there are fewer of them than ranks, a tied output layer is
    the embedding, and the vocabulary is padded to a `multiple` that the ranks share evenly. That of
    the local engine is not: `multiple` 1.
    """
    h, d, f = shape.hidden_size, shape.head_dim, shape.ffn_size // tp
    q, kv = shape.num_heads // tp * d, max(1, shape.num_kv_heads // tp) * d
    if -(-shape.vocab_size // multiple) * multiple % tp:
        multiple *= tp
    vocabulary = -(-shape.vocab_size // multiple) * multiple // tp
    matrices = (2 * q + 2 * kv) * h + 3 * h * f
    small = 2 * h + (q + 2 * kv if shape.qkv_bias else 0) + (2 * d if shape.qk_norm else 0)
    return EngineCount(
        matrices=shape.num_layers * matrices,
        others=shape.num_layers * small + h + vocabulary * h * (1 if shape.tied_embeddings else 2),
    )
