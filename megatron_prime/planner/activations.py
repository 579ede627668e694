"""Bytes that micro-batches need on one rank: what the backward pass keeps, and what comes and goes.

The count follows "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et
al., arXiv 2205.05198, sections 4 and 5), adapted to these models: no dropout, fused attention (its
score matrix is never kept), grouped queries, SwiGLU. Per token of a layer, in values of the
activations' type, with t tensor-parallel ranks and r = 1 / t under sequence parallelism, else 1:

    norms      2 h r        inputs                           the statistics: 4 bytes each
    linears    2 h r        inputs of qkv and fc1; in FP8 they are 1 byte each
    attention  (3 q + 3 kv) / t    projections, rotated q and k, output; 4 bytes per head
    SwiGLU     5 f / t      fc1's output 2 f, its linear half once more, the gate, fc2's input;
                            3 f / t with `megatron.bias_activation_fusion`

Plain torch layers keep 8 h r bytes for each norm (input and normed input in fp32), as measured on a
CPU. Sources: models/torch_spec.py, megatron/core/transformer/{mlp,attention,transformer_layer}.py.
That Transformer Engine's layers keep what stands in the table is an assumption, not measured yet.

Recomputation (transformer_block.py): `full` keeps the input of each group of layers; `selective`
drops what the modules in `recompute_modules` made: `core_attn` the attention's statistics, `mlp`
all of SwiGLU. Pipelines (schedules.py) hold P - p micro-batches on stage p, or interleaved
2 (P - p - 1) + (V - 1) P + 1 chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron_prime.config import ParallelSizes, PrecisionOptions
from megatron_prime.planner.states import VALUE_BYTES
from megatron_prime.weights.shape import ModelShape

_FP32 = 4


@dataclass(frozen=True, slots=True)
class Computation:
    """How a rank computes, as far as memory goes."""

    sizes: ParallelSizes
    stage: int
    value_bytes: int
    fp8: bool
    transformer_engine: bool
    sequence_parallel: bool
    fused_swiglu: bool
    recompute: str | None  # "full", "selective"
    recompute_method: str | None  # of full: "uniform", "block"
    recompute_layers: int  # of full
    recompute_modules: tuple[str, ...]  # of selective
    fp32_logits: bool  # divided by a temperature other than 1

    @classmethod
    def of(
        cls,
        megatron: Mapping[str, Any],
        sizes: ParallelSizes,
        stage: int,
        precision: PrecisionOptions,
        temperature: float,
        on_gpu: bool,
    ) -> Self:
        """From the tables of a run."""
        modules = megatron.get("recompute_modules") or ("core_attn",)
        return cls(
            sizes=sizes,
            stage=stage,
            value_bytes=VALUE_BYTES[precision.dtype],
            fp8=precision.fp8 is not None,
            transformer_engine=on_gpu and megatron.get("transformer_impl") != "local",
            sequence_parallel=bool(megatron.get("sequence_parallel")) and sizes.tp > 1,
            fused_swiglu=bool(megatron.get("bias_activation_fusion")) and on_gpu,
            recompute=megatron.get("recompute_granularity"),
            recompute_method=megatron.get("recompute_method"),
            recompute_layers=megatron.get("recompute_num_layers") or 1,
            recompute_modules=tuple(modules),
            fp32_logits=temperature != 1.0,
        )

    @property
    def share(self) -> float:
        """Of the tokens, between the tensor-parallel regions."""
        return 1 / self.sizes.tp if self.sequence_parallel else 1.0

    @property
    def is_last(self) -> bool:
        """Whether the stage makes the logits."""
        return self.stage == self.sizes.pp - 1


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes of one model's micro-batches on one rank, at their largest."""

    saved: int  # for the backward pass, of all micro-batches in flight, without logits
    logits: int  # with what the loss makes of them
    training: int  # most at any moment of forward and backward
    scoring: int  # most at any moment of a forward without gradients


def activations(
    shape: ModelShape, how: Computation, tokens: int, wanted: int, micro_batches: int
) -> ActivationBytes:
    """For micro-batches of `tokens` on this rank, `wanted` of them before a response token.

    `micro_batches` are those of an optimizer step on one data-parallel rank.
    """
    in_flight = chunks_in_flight(how.sizes, how.stage, micro_batches)
    saved = in_flight * chunk_bytes(shape, how, tokens)
    passing, after_loss = _backward_peak(shape, how, tokens)
    logits = without_gradient = 0
    if how.is_last:
        saved += _head_bytes(shape, how, tokens, wanted)
        without_gradient = logits_bytes(shape, how, tokens, wanted)
        logits = logits_bytes(shape, how, tokens, wanted, with_gradient=True)
    forward = max(_forward_peak(shape, how, tokens), without_gradient)
    borders = 8 if how.sizes.pp > 1 else 4  # hidden states: residual, norms, received, sent
    return ActivationBytes(
        saved=saved,
        logits=logits,
        training=saved + max(logits, passing, after_loss),
        scoring=forward + round(borders * how.value_bytes * shape.hidden_size * tokens * how.share),
    )


def chunks_in_flight(sizes: ParallelSizes, stage: int, micro_batches: int) -> int:
    """Chunks of layers whose activations wait for their backward pass, at most."""
    before = sizes.pp - stage - 1
    if sizes.vpp == 1:
        return min(before + 1, micro_batches)
    return min(2 * before + (sizes.vpp - 1) * sizes.pp + 1, micro_batches * sizes.vpp)


def chunk_bytes(shape: ModelShape, how: Computation, tokens: int) -> int:
    """What one micro-batch leaves in one chunk's layers for the backward pass."""
    layers = shape.num_layers // (how.sizes.pp * how.sizes.vpp)
    whole = layer_bytes(shape, how, tokens)
    entrance = round(how.value_bytes * shape.hidden_size * tokens * how.share)
    received = 0 if how.transformer_engine or how.stage == 0 else entrance
    if how.recompute != "full":
        return layers * whole + received
    if how.recompute_method == "block":
        kept = min(how.recompute_layers, layers)
        return kept * entrance + (layers - kept) * whole
    return -(-layers // how.recompute_layers) * entrance


def layer_bytes(shape: ModelShape, how: Computation, tokens: int) -> int:
    """What one layer keeps of a micro-batch, `full` recomputation aside."""
    selective = how.recompute_modules if how.recompute == "selective" else ()
    tp, b = how.sizes.tp, how.value_bytes
    h, f = shape.hidden_size * how.share, shape.ffn_size / tp
    q, kv = shape.num_heads * shape.head_dim / tp, shape.num_kv_heads * shape.head_dim / tp
    heads, kv_heads = shape.num_heads / tp, shape.num_kv_heads / tp
    linear_input = 1 if how.fp8 else b
    norm = (b * h if how.transformer_engine else 2 * _FP32 * h) + _FP32 * how.share
    attention = b * (3 * q + 3 * kv)
    if how.fp8:
        attention += q  # the output once more, as the projection's input
    if "core_attn" not in selective:
        attention += _FP32 * heads
    elif not how.transformer_engine:
        attention -= b * kv  # RoPE is inside, so the rotated keys are not kept
    if not how.transformer_engine and how.sizes.cp > 1:  # keys and values of all ranks
        attention = b * (3 * q + 2 * kv * how.sizes.cp) + _FP32 * heads
    if shape.qk_norm:
        attention += b * (q + kv) if how.transformer_engine else _norm_of_heads(b, q, kv)
        attention += _FP32 * (heads + kv_heads)
    mlp = b * (2 if how.fused_swiglu else 4) * f + linear_input * f
    before_mlp = norm + linear_input * h
    if "mlp" in selective:
        mlp = 0
        if how.transformer_engine:  # the norm is part of fc1, and recomputed with it
            before_mlp = b * h
    return round(tokens * (norm + linear_input * h + attention + before_mlp + mlp))


def _norm_of_heads(b: int, q: float, kv: float) -> float:
    """Plain torch: inputs (in fp32 the keys' are the projection itself) and normed inputs."""
    return _FP32 * (q + kv) + _FP32 * (q if b == _FP32 else q + kv)


def logits_bytes(
    shape: ModelShape, how: Computation, tokens: int, wanted: int, with_gradient: bool = False
) -> int:
    """Logits, and two fp32 copies in which softmax and its gradient are made (models/logprobs.py).

    At a temperature other than 1 they are divided in fp32 first; half-precision ones have a
    gradient of their own. Under sequence parallelism those of all tokens are made first.
    """
    if shape.value_head:  # values, and the loss's few fp32 numbers of each
        return 8 * _FP32 * (tokens if how.sequence_parallel else wanted)
    columns = shape.padded_vocab_size // how.sizes.tp
    b = how.value_bytes
    at_loss = b + 2 * _FP32
    if how.fp32_logits:
        at_loss += _FP32
    elif with_gradient and b < _FP32:
        at_loss += b
    made = columns * b * (tokens + wanted) if how.sequence_parallel else 0
    return max(columns * wanted * at_loss, made)


def _head_bytes(shape: ModelShape, how: Computation, tokens: int, wanted: int) -> int:
    """The final norm and the input of the output layer; a value head's is copied to fp32."""
    b, h = how.value_bytes, shape.hidden_size
    norm = how.share * ((b * h if how.transformer_engine else 2 * _FP32 * h) + _FP32)
    rows = tokens * how.share if how.sequence_parallel else wanted
    copies = b + _FP32 * (shape.value_head and b < _FP32)
    return round(tokens * norm + copies * h * rows)


def _forward_peak(shape: ModelShape, how: Computation, tokens: int) -> int:
    """The widest place of a layer: in SwiGLU, or around attention; gathered inputs with it."""
    tp, b = how.sizes.tp, how.value_bytes
    q, kv = shape.num_heads * shape.head_dim / tp, shape.num_kv_heads * shape.head_dim / tp
    mlp = (3 if how.fused_swiglu else 5) * shape.ffn_size / tp
    return round(tokens * b * (max(mlp, 4 * q + 4 * kv) + shape.hidden_size))


def _backward_peak(shape: ModelShape, how: Computation, tokens: int) -> tuple[int, int]:
    """What is needed beside what is saved: inside a layer, and in the output layer.

    A weight's gradient is made whole, in the activations' type, before it is added to the buffer.
    """
    tp, b, h = how.sizes.tp, how.value_bytes, shape.hidden_size
    f, columns = shape.ffn_size // tp, shape.padded_vocab_size // tp
    makes_logits = how.is_last and not shape.value_head
    at_an_end = makes_logits or how.stage == 0
    matrix = b * h * max(2 * f, columns if at_an_end else 0)
    recomputed = 0
    if how.recompute == "full":
        group = how.recompute_layers if how.recompute_method == "uniform" else 1
        recomputed = min(group, shape.num_layers) * layer_bytes(shape, how, tokens)
    elif how.recompute == "selective" and "mlp" in how.recompute_modules:
        recomputed = tokens * b * (3 if how.fused_swiglu else 5) * f
    in_layer = tokens * b * (3 * f + 2 * h) + matrix + recomputed
    return in_layer, b * columns * (tokens + h) if makes_logits else 0
