"""The whole model in Hugging Face names on every rank, a bucket at a time.

What a rollout engine, an export and a comparison want are Hugging Face tensors; what the ranks hold
are Megatron's shards of one pipeline stage. Each stage's shards travel in flat buckets: first each
tensor-parallel rank broadcasts its shards to the same rank of the other stages, then the
tensor-parallel neighbours exchange them. So two collectives move a bucket of many tensors, and no
rank ever holds more than one bucket beside its own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_prime.weights.layout import join, unfuse
from megatron_prime.weights.names import Entry, entries, parameters_by_entry
from megatron_prime.weights.shape import ModelShape

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Shard:
    """A parameter as one tensor-parallel rank of its stage holds it."""

    entry: Entry
    size: tuple[int, ...]
    dtype: torch.dtype


def gather_hf_tensors(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the Hugging Face checkpoint, whole, without padding, in the parameters' type.

    Collective over the model-parallel group: all its ranks must run through the iterator. Every
    rank gets the same tensors in the same order, on its device; they share no memory with the
    model and stay valid. Tied embeddings come once, FP8 weights dequantised. A bucket holds at most
    `bucket_bytes` of whole tensors, or a single tensor (or fused group) that is larger.
    """
    mine = {
        entry.megatron: parameter.detach()
        for entry, parameter, is_copy in parameters_by_entry(chunks, shape)
        if not is_copy
    }
    tp_group = parallel_state.get_tensor_model_parallel_group()
    tp: int = tp_group.size()
    device = next(iter(mine.values())).device
    for stage, shards in enumerate(_shards_of_stages(mine, shape)):
        for bucket in _buckets(shards, bucket_bytes // tp):
            flat = _broadcast(bucket, mine, stage, device)
            gathered = [flat]
            if tp > 1:
                gathered = [torch.empty_like(flat) for _ in range(tp)]
                dist.all_gather(gathered, flat, group=tp_group)
            yield from _take_apart(bucket, gathered, shape)


def _shards_of_stages(mine: dict[str, Tensor], shape: ModelShape) -> list[list[_Shard]]:
    """What each pipeline stage holds, in the order of the table; collective."""
    held = [
        _Shard(entry, tuple(mine[entry.megatron].shape), mine[entry.megatron].dtype)
        for entry in entries(shape)
        if entry.megatron in mine
    ]
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[list[_Shard]] = [[]] * group.size()
    dist.all_gather_object(stages, held, group=group)
    return stages


def _buckets(shards: list[_Shard], max_bytes: int) -> Iterator[list[_Shard]]:
    """Cut the list where the bytes of one rank's shards would pass `max_bytes` or change type."""
    bucket: list[_Shard] = []
    held = 0
    for shard in shards:
        nbytes = prod(shard.size) * shard.dtype.itemsize
        if bucket and (held + nbytes > max_bytes or shard.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(shard)
        held += nbytes
    if bucket:
        yield bucket


def _broadcast(
    bucket: list[_Shard], mine: dict[str, Tensor], stage: int, device: torch.device
) -> Tensor:
    """The bucket's shards one after the other, from `stage` to all pipeline stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.rank() == stage:
        flat = torch.cat([values_of(mine[shard.entry.megatron]).flatten() for shard in bucket])
    else:
        numel = sum(prod(shard.size) for shard in bucket)
        flat = torch.empty(numel, dtype=bucket[0].dtype, device=device)
    if group.size() > 1:
        dist.broadcast(flat, dist.get_global_rank(group, stage), group=group)
    return flat


def values_of(parameter: Tensor) -> Tensor:
    """A parameter's values in its nominal type; FP8 ones become a copy, so a bucket at a time."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter


def _take_apart(
    bucket: list[_Shard], gathered: list[Tensor], shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors from the flat buckets of all tensor-parallel ranks."""
    tp = len(gathered)
    sizes = [prod(shard.size) for shard in bucket]
    for shard, *flats in zip(bucket, *(flat.split(sizes) for flat in gathered), strict=True):
        layout = shard.entry.layout
        parts_of_ranks = [
            unfuse(layout, flat.view(shard.size), shape, tp, rank)
            for rank, flat in enumerate(flats)
        ]
        for name, *stretches in zip(shard.entry.hf, *parts_of_ranks, strict=True):
            yield name, join(layout, stretches)
