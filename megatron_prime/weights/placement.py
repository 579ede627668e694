"""Which stretch of which Hugging Face tensor lies where: in the trainer, and in SGLang.

The trainer's ranks and the engine's ranks cut the same tensors in different ways. Both cuts are
written down here in one language, the coordinates of the Hugging Face tensor: a `Region` is a
half-open range of indices per dimension. `plan.py` intersects the two. Everything is a pure
function of the model's shape and two layouts; the live parameters are held against it at run time.

The trainer (Megatron-core): ranks are numbered tensor-parallel neighbours first, then context
parallel ones, data-parallel replicas, pipeline stages; a stage holds its layers in `vpp` chunks.
The engine (SGLang): one server per `tp` neighbouring ranks, each holding a whole model. It fuses
q, k, v and gate, up; it repeats key/value heads when there are fewer of them than ranks; it pads
the vocabulary to a multiple of 64; a tied output layer is the embedding itself. In FP8 a linear
layer is two parameters: rounded values, and the scale of each block of 128 × 128 (`blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from megatron_prime.config import ConfigError, ParallelSizes
from megatron_prime.weights.layout import Layout, part_of
from megatron_prime.weights.names import Entry, entries, hf_shapes
from megatron_prime.weights.shape import ModelShape

Region = tuple[tuple[int, int], ...]  # (start, stop) per dimension

BLOCK = 128  # rows and columns of the weights that share an FP8 scale
_VOCAB_MULTIPLE = 64  # sglang/srt/layers/vocab_parallel_embedding.py


class Form(Enum):
    """What of a tensor is sent."""

    VALUES = "values"  # as they are
    FP8 = "fp8"  # rounded to e4m3
    SCALES = "scales"  # of the blocks, float32


def intersection(a: Region, b: Region) -> Region | None:
    """What lies in both; None if nothing does."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def relative(region: Region, origin: Region, offset: int = 0) -> Region:
    """`region` counted from the start of `origin`, its rows moved by `offset`."""
    rows, *others = [(a - o, b - o) for (a, b), (o, _) in zip(region, origin, strict=True)]
    return ((rows[0] + offset, rows[1] + offset), *others)


def numel(region: Region) -> int:
    """Elements inside."""
    return prod(stop - start for start, stop in region)


def blocks(region: Region) -> Region:
    """The blocks of 128 × 128 that a region of a matrix touches, in the grid of all blocks."""
    return tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in region)


def slices(region: Region) -> tuple[slice, ...]:
    """To index a tensor with."""
    return tuple(slice(*bounds) for bounds in region)


def whole(size: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return tuple((0, length) for length in size)


@dataclass(frozen=True, slots=True)
class TrainingLayout:
    """How the trainer's ranks share the policy."""

    sizes: ParallelSizes
    world_size: int

    def holders(self, stage: int, tp_rank: int | None) -> list[int]:
        """Ranks that hold a tensor-parallel rank's shard of a stage; None: of any."""
        tp, per_stage = self.sizes.tp, self.world_size // self.sizes.pp
        first = stage * per_stage
        if tp_rank is None:
            return list(range(first, first + per_stage))
        return list(range(first + tp_rank, first + per_stage, tp))

    def stages_of(self, entry: Entry, shape: ModelShape) -> tuple[int, ...]:
        """Pipeline stages that hold the entry; two for a tied embedding."""
        last = self.sizes.pp - 1
        place, _, rest = entry.megatron.partition(".")
        if place == "embedding":
            return (0, last) if shape.tied_embeddings and last else (0,)
        if not rest.startswith("layers."):
            return (last,)
        layer = int(rest.split(".")[1])
        return (layer // (shape.num_layers // (self.sizes.pp * self.sizes.vpp)) % self.sizes.pp,)

    def region(
        self, entry: Entry, size: tuple[int, ...], shape: ModelShape, tp_rank: int | None
    ) -> Region:
        """What a tensor-parallel rank's shard holds of one of the entry's tensors, of `size`."""
        part = part_of(entry.layout, size, shape, self.sizes.tp, tp_rank or 0)
        rows_and_columns = tuple((found.start, found.stop) for found in part)
        return rows_and_columns + whole(size)[len(part) :]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A region of a Hugging Face tensor inside an engine rank's parameter."""

    hf: str
    region: Region
    row: int  # of the parameter, where the region's first row lies


@dataclass(frozen=True, slots=True)
class EngineParameter:
    """A parameter of one SGLang rank and what it is made of; rows without a stretch are zero."""

    name: str
    size: tuple[int, ...]
    entry: Entry
    stretches: tuple[Stretch, ...]
    form: Form = Form.VALUES

    def in_fp8(self) -> tuple[EngineParameter, EngineParameter]:
        """What becomes of it: rounded values, and the scales of their blocks."""
        grid = tuple(-(-length // BLOCK) for length in self.size)
        scales = tuple(
            Stretch(part.hf, blocks(part.region), part.row // BLOCK) for part in self.stretches
        )
        name = f"{self.name}_scale_inv"
        return (
            replace(self, form=Form.FP8),
            EngineParameter(name, grid, self.entry, scales, Form.SCALES),
        )


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """How SGLang's servers share the trainer's ranks: server i has ranks i * tp and on."""

    tp: int
    world_size: int
    fp8: bool = False

    @property
    def servers(self) -> int:
        """Number of SGLang servers."""
        return self.world_size // self.tp

    def check(self, shape: ModelShape) -> None:
        """Raise ConfigError if SGLang can't cut this model so, or the ranks don't fit."""
        knob = f"rollout.tensor_parallel_size: found {self.tp}, "
        if self.world_size % self.tp:
            raise ConfigError(f"{knob}which does not divide the run's {self.world_size} ranks")
        heads, kv = shape.num_heads, shape.num_kv_heads
        if heads % self.tp or shape.ffn_size % self.tp or (kv % self.tp and self.tp % kv):
            raise ConfigError(
                f"{knob}wanted a divisor of the model's {heads} attention heads and of its "
                f"intermediate_size {shape.ffn_size}, and a divisor or multiple of its {kv} "
                "key/value heads"
            )
        uneven = {
            stretch.hf: [stop - start for start, stop in stretch.region]
            for parameter in self.parameters(shape, 0)
            for stretch in parameter.stretches
            if parameter.form is Form.FP8
            if any(bound % BLOCK for bounds in stretch.region for bound in bounds)
        }
        if uneven:
            name, size = next(iter(uneven.items()))
            raise ConfigError(
                f"rollout.fp8_weights: {name} is {size} on each of rollout.tensor_parallel_size = "
                f"{self.tp} ranks, wanted multiples of {BLOCK}; choose other ranks or leave it off"
            )

    def parameters(self, shape: ModelShape, rank: int) -> Iterator[EngineParameter]:
        """What rank `rank` of each server holds, in the order of the layers."""
        for parameter in self._plain_parameters(shape, rank):
            matrix = len(parameter.size) == 2 and parameter.entry.layout is not Layout.VOCAB
            if self.fp8 and matrix:
                yield from parameter.in_fp8()
            else:
                yield parameter

    def _plain_parameters(self, shape: ModelShape, rank: int) -> Iterator[EngineParameter]:
        sizes = hf_shapes(shape)
        for entry in entries(shape):
            row, stretches = 0, []
            for hf in entry.hf:
                region = self._region(hf, entry, sizes[hf], shape, rank)
                stretches.append(Stretch(hf, region, row))
                row += region[0][1] - region[0][0]
            if entry.layout is Layout.VOCAB:
                row = self._vocab_rows(shape)
            columns = tuple(stop - start for start, stop in stretches[0].region[1:])
            used = tuple(stretch for stretch in stretches if numel(stretch.region))
            yield EngineParameter(_sglang_name(entry), (row, *columns), entry, used)

    def _region(
        self, hf: str, entry: Entry, size: tuple[int, ...], shape: ModelShape, rank: int
    ) -> Region:
        rows, others = size[0], whole(size)[1:]
        if entry.layout is Layout.WHOLE:
            return whole(size)
        if entry.layout is Layout.COLUMNS:
            width = size[1] // self.tp
            return ((0, rows), (rank * width, (rank + 1) * width))
        if entry.layout is Layout.VOCAB:
            share = self._vocab_rows(shape)
            return ((min(rank * share, rows), min((rank + 1) * share, rows)), *others)
        parts, part = self.tp, rank
        if entry.layout is Layout.QKV and ".q_proj." not in hf:
            parts = min(self.tp, shape.num_kv_heads)
            part = rank * parts // self.tp  # neighbours share a head when there are too few
        share = rows // parts
        return ((part * share, (part + 1) * share), *others)

    def _vocab_rows(self, shape: ModelShape) -> int:
        """Rows of one rank's embedding."""
        multiple = _VOCAB_MULTIPLE
        if -(-shape.vocab_size // multiple) * multiple % self.tp:
            multiple *= self.tp
        return -(-shape.vocab_size // multiple) * multiple // self.tp


def _sglang_name(entry: Entry) -> str:
    """The name of the entry's parameter in SGLang's models."""
    if entry.layout is Layout.QKV:
        return entry.hf[0].replace(".q_proj.", ".qkv_proj.")
    if entry.layout is Layout.GATE_UP:
        return entry.hf[0].replace(".gate_proj.", ".gate_up_proj.")
    return entry.hf[0]
