"""Bytes of what a trained model keeps between micro-batches: weights, gradients, masters, moments.

Megatron's DDP lays all gradients of a chunk into one fp32 buffer per type of parameter, in reverse
order, cut into buckets (megatron/core/distributed/param_and_grad_buffer.py). With the distributed
optimizer, which runs on GPUs, the parameters themselves lie in a buffer of the same form, each
starts at a multiple of 64 values, each bucket is padded to a multiple of lcm(128, ranks), and of
each bucket every data- and context-parallel rank keeps masters and moments of an equal stretch
(distrib_optimizer.py). Without it, on a CPU, nothing is padded and every rank keeps all.

    per value   bf16 or fp16: weight 2, gradient 4, master 4, moments 4 + 4
                fp32:         weight 4, gradient 4,            moments 4 + 4  (it is its own master)
                fp8_param:    weight 1 + 1 (along rows, and along columns for the backward pass)

FP8 products without `fp8_param` keep such two copies beside the bf16 weights, from the first
micro-batch on. What block scales add (4 bytes per 128 × 128, 1 per 32) is counted, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import lcm

from megatron_prime.config import PrecisionOptions
from megatron_prime.planner.counts import Parameter

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP8_COPIES = 2  # along rows and along columns
_SCALE_BYTES = {"delayed": 0.0, "tensorwise": 0.0, "blockwise": 4 / 128**2, "mxfp8": 1 / 32}
_START, _END = 64, 128  # values; param_and_grad_buffer.py:576-610
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000  # distributed_data_parallel.py


@dataclass(frozen=True, slots=True)
class Sharding:
    """How gradients and optimizer states are spread over the ranks that hold the same weights."""

    distributed: bool  # Megatron's distributed optimizer, with overlapped gradient reduction
    rank: int = 0  # among the data- and context-parallel ranks
    ranks: int = 1  # data-parallel times context-parallel
    data_parallel: int = 1
    stage: int = 0  # of the pipeline


@dataclass(slots=True)
class StateBytes:
    """Bytes of one model on one rank, and the sizes that transient tensors go by."""

    weights: int = 0
    fp8_copies: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    largest_shard: int = 0  # values of the largest tensor that the optimizer steps

    @property
    def by_kind(self) -> dict[str, int]:
        """What is kept, by its name."""
        kinds = ("weights", "fp8_copies", "gradients", "masters", "moments")
        return {kind: getattr(self, kind) for kind in kinds}


def frozen_bytes(
    chunks: Sequence[Sequence[Parameter]], layers: int, precision: PrecisionOptions
) -> StateBytes:
    """A model that is only asked for log-probs; `layers` are those of the whole model."""
    found = StateBytes()
    for parameter in (parameter for chunk in chunks for parameter in chunk):
        found.weights += _weight(parameter.numel, parameter, layers, precision)
        found.fp8_copies += _copies(parameter, layers, precision)
    return found


def trained_bytes(
    chunks: Sequence[Sequence[Parameter]],
    layers: int,
    precision: PrecisionOptions,
    sharding: Sharding,
) -> StateBytes:
    """A model with gradients and AdamW, after its first step (moments are made by it)."""
    found = StateBytes()
    for chunk in chunks:
        kept_in_fp8 = [_kept_in_fp8(parameter, layers, precision) for parameter in chunk]
        for in_fp8 in (False, True):
            members = [p for p, fp8 in zip(chunk, kept_in_fp8, strict=True) if fp8 is in_fp8]
            if members:
                _add_buffer(found, members, in_fp8, precision, sharding)
        found.fp8_copies += sum(_copies(parameter, layers, precision) for parameter in chunk)
    return found


def _add_buffer(
    found: StateBytes,
    members: Sequence[Parameter],
    in_fp8: bool,
    precision: PrecisionOptions,
    sharding: Sharding,
) -> None:
    layout = _Buffer(sharding)
    for parameter in reversed(members):
        layout.add(parameter)
    layout.end()
    own = [shard for bucket in layout.buckets for shard in bucket.shards(sharding)]
    scales = _SCALE_BYTES[precision.fp8_recipe] if in_fp8 else 0.0
    per_value = 1 if in_fp8 else VALUE_BYTES[precision.dtype]
    values = sum(parameter.numel for parameter in members)
    held = values if in_fp8 and precision.fp8_recipe == "mxfp8" else layout.numel
    found.weights += held * per_value
    if in_fp8:
        found.weights += values * (_FP8_COPIES - 1) + round(_FP8_COPIES * scales * values)
    found.gradients += 4 * layout.numel
    found.masters += 4 * sum(own) if in_fp8 or precision.dtype != "fp32" else 0
    found.moments += 8 * sum(own)
    found.largest_shard = max([found.largest_shard, *own])


@dataclass(slots=True)
class _Bucket:
    """A stretch of a buffer that is reduced at once."""

    start: int
    members: list[tuple[int, int]] = field(default_factory=list)  # (start, end) of parameters
    end: int = 0  # padded

    def shards(self, sharding: Sharding) -> Iterator[int]:
        """Values of each parameter that this rank steps."""
        first, last = self.start, self.end
        if sharding.distributed:
            share = (self.end - self.start) // sharding.ranks
            first, last = (self.start + share * (sharding.rank + i) for i in (0, 1))
        for start, end in self.members:
            if (values := min(end, last) - max(start, first)) > 0:
                yield values


class _Buffer:
    """Megatron's `_ParamAndGradBuffer`, as far as sizes go."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._limit: int | None = None  # values after which a bucket is full
        if sharding.distributed and sharding.stage == 0:
            self._limit = max(_BUCKET, _BUCKET_PER_RANK * sharding.data_parallel)
        self._multiple = lcm(sharding.ranks, _END)
        self.buckets = [_Bucket(0)]
        self._at = 0

    @property
    def numel(self) -> int:
        """Values, padding included."""
        return self.buckets[-1].end

    def add(self, parameter: Parameter) -> None:
        """Lay the next parameter behind the others."""
        alone = parameter.is_shared_embedding and self._sharding.distributed
        start = self._up(self._at, _START)
        if alone and self.buckets[-1].members:
            start = self._close(start)
        self._at = start + parameter.numel
        bucket = self.buckets[-1]
        bucket.members.append((start, self._at))
        is_full = self._limit is not None and self._at - bucket.start >= self._limit
        if is_full or alone:
            self._at = self._close(self._at)

    def end(self) -> None:
        """Close the last bucket."""
        if self.buckets[-1].members:
            self._close(self._at)
        self.buckets.pop()

    def _close(self, end: int) -> int:
        self.buckets[-1].end = self._up(end, self._multiple)
        self.buckets.append(_Bucket(self.buckets[-1].end))
        return self.buckets[-1].start

    def _up(self, number: int, multiple: int) -> int:
        return -(-number // multiple) * multiple if self._sharding.distributed else number


def _multiplied_in_fp8(parameter: Parameter, layers: int, precision: PrecisionOptions) -> bool:
    """Whether it is a layer's matrix whose products are in FP8 (megatron/core/fp8_utils.py)."""
    if precision.fp8 is None or parameter.layer is None:
        return False
    if not precision.first_last_layers_bf16:
        return True
    last = layers - precision.num_layers_at_end_in_bf16
    return precision.num_layers_at_start_in_bf16 <= parameter.layer < last


def _kept_in_fp8(parameter: Parameter, layers: int, precision: PrecisionOptions) -> bool:
    return precision.fp8_param and _multiplied_in_fp8(parameter, layers, precision)


def _fp8_bytes(numel: int, precision: PrecisionOptions) -> int:
    return round(_FP8_COPIES * (1 + _SCALE_BYTES[precision.fp8_recipe]) * numel)


def _weight(numel: int, parameter: Parameter, layers: int, precision: PrecisionOptions) -> int:
    if _kept_in_fp8(parameter, layers, precision):
        return _fp8_bytes(numel, precision)
    return numel * VALUE_BYTES[precision.dtype]


def _copies(parameter: Parameter, layers: int, precision: PrecisionOptions) -> int:
    if precision.fp8_param or not _multiplied_in_fp8(parameter, layers, precision):
        return 0
    return _fp8_bytes(parameter.numel, precision)
