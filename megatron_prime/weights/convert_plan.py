"""What a conversion will write, from tables alone: which parameters go into which file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_prime.errors import WeightsError
from megatron_prime.weights.convert_sources import Source
from megatron_prime.weights.dtypes import ITEMSIZE
from megatron_prime.weights.names import Entry, disk_key, entries, hf_shapes
from megatron_prime.weights.raw_safetensors import SHARD_BYTES
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.shard_jobs import Job
from megatron_prime.weights.torch_dist import fused_size


@dataclass(frozen=True, slots=True)
class Options:
    """How to convert."""

    dtype: str | None = None  # None: as it is
    tp: int = 1  # cut parameters as that many tensor-parallel ranks read them
    pp: int = 1  # no file has layers of two of that many pipeline stages
    shard_bytes: int = SHARD_BYTES  # of a file, unless one parameter is larger
    workers: int = 1
    verify: bool = False  # compare before it is published; of an existing output, do only that


def plan(
    source: Source, shape: ModelShape, options: Options, name: str, first: int = 0
) -> list[Job]:
    """Which parameters go into which file, in the order of the model."""
    groups: list[list[Entry]] = []
    held, stage = 0, -1
    for entry in entries(shape):
        nbytes = nbytes_of(entry, source, shape, options)
        layer = disk_key(entry.megatron)[1]
        now = max(stage, 0) if layer is None else layer * options.pp // shape.num_layers
        if not groups or held + nbytes > options.shard_bytes or now != max(stage, 0):
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held, stage = held + nbytes, now
    return [
        Job(
            name.format(number, len(groups) - 1 + first),
            tuple(group),
            sum(nbytes_of(entry, source, shape, options) for entry in group),
        )
        for number, group in enumerate(groups, first)
    ]


def nbytes_of(entry: Entry, source: Source, shape: ModelShape, options: Options) -> int:
    """Bytes of an entry's tensors as they will be written."""
    itemsize = ITEMSIZE[options.dtype or source.dtype(entry)]
    return sum(prod(size) for size in hf_sizes(entry, shape)) * itemsize


def hf_sizes(entry: Entry, shape: ModelShape) -> list[tuple[int, ...]]:
    """Of an entry's Hugging Face tensors."""
    sizes = _all_hf_sizes(shape)
    return [sizes[name] for name in entry.hf]


_all_hf_sizes = lru_cache(maxsize=1)(hf_shapes)


def disk_sizes(
    source: Source, shape: ModelShape, options: Options
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Size and type of each key. WeightsError where layers, which share a key, differ in type."""
    sizes: dict[str, tuple[tuple[int, ...], str]] = {}
    for entry in entries(shape):
        key, layer = disk_key(entry.megatron)
        size = fused_size(entry.layout, hf_sizes(entry, shape), shape)
        whole = size if layer is None else (shape.num_layers, *size)
        dtype = options.dtype or source.dtype(entry)
        if sizes.setdefault(key, (whole, dtype))[1] != dtype:
            raise WeightsError(
                f"{source.folder}: {entry.megatron} is in {dtype}, the layers before it in "
                f"{sizes[key][1]}, and a distributed checkpoint has one type for all; give --dtype"
            )
    return sizes


def check_layout(shape: ModelShape, options: Options) -> None:
    """WeightsError for a layout that the model does not have."""
    split = (shape.num_heads, shape.num_kv_heads, shape.ffn_size)
    if options.tp < 1 or any(count % options.tp for count in split):
        raise WeightsError(
            f"--tp {options.tp}: wanted a divisor of the model's {split[0]} heads, {split[1]} "
            f"key/value heads and {split[2]} feed-forward units"
        )
    if not 1 <= options.pp <= shape.num_layers:
        raise WeightsError(f"--pp {options.pp}: wanted 1 to the model's {shape.num_layers} layers")


def largest(source: Source, shape: ModelShape) -> int:
    """Bytes of the largest Hugging Face tensor, as the source has it."""
    return max(
        prod(size) * ITEMSIZE[source.dtype(entry)]
        for entry in entries(shape)
        for size in hf_sizes(entry, shape)
    )
