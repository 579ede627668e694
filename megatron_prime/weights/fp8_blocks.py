"""Weights rounded to FP8 (e4m3) in blocks of 128 × 128, shard by shard.

A block's scale is its largest absolute value over 448, e4m3's largest; stored values times scale
are the weights (the format of DeepSeek-V3's checkpoints, SGLang's `weight_scale_inv`). Blocks are
counted from the start of the Hugging Face tensor, so a shard whose edges are multiples of 128 is
rounded where it lies. Where an edge cuts through a block, the tensor-parallel neighbours first
agree on the block's largest value; so the result never depends on the layout of the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prime.protocols import WeightSource
from megatron_prime.weights.placement import BLOCK, Region, blocks, whole

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class BlockScales:
    """The scales of all matrices that a rank holds a part of; right for the blocks it touches."""

    def __init__(self, grids: Mapping[str, Tensor]) -> None:
        """`grids`: float32 [rows / 128, columns / 128] by Hugging Face name."""
        self._grids = grids

    @classmethod
    def of(
        cls,
        source: WeightSource,
        regions: Mapping[str, Region],
        sizes: Mapping[str, tuple[int, ...]],
        group: dist.ProcessGroup | None,
    ) -> BlockScales:
        """Measure what this rank holds; collective over `group`, its tensor-parallel neighbours.

        `regions`: what the rank holds of the matrices that are to be rounded; the neighbours hold
        other parts of the same ones.
        """
        grids = {}
        for hf, region in regions.items():
            grids[hf] = largest_values(source.stretch(hf).float(), region, sizes[hf])
            source.forget()
        shared = [hf for hf in grids if _is_torn(sizes[hf], regions[hf])]
        if group is not None and group.size() > 1 and shared:
            flat = torch.cat([grids[hf].flatten() for hf in shared])
            dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
            parts = flat.split([grids[hf].numel() for hf in shared])
            for hf, part in zip(shared, parts, strict=True):
                grids[hf] = part.view_as(grids[hf])
        return cls({hf: _scales(grid) for hf, grid in grids.items()})

    def grid(self, hf: str) -> Tensor:
        """Scales of all blocks of a tensor; those that this rank does not touch mean nothing."""
        return self._grids[hf]


def largest_values(values: Tensor, region: Region, size: tuple[int, ...]) -> Tensor:
    """Largest absolute value in each block of a matrix of `size`, of which `values` is `region`.

    float32 [rows / 128, columns / 128], rounded up; 0 in blocks outside.
    """
    (top, bottom), (left, right) = blocks(region)
    rows, columns = (start % BLOCK for start, _ in region)
    room = values.new_zeros((bottom - top) * BLOCK, (right - left) * BLOCK)
    room[rows : rows + values.shape[0], columns : columns + values.shape[1]] = values
    found = room.view(bottom - top, BLOCK, right - left, BLOCK).abs().amax(dim=(1, 3))
    grid = values.new_zeros([stop for _, stop in blocks(whole(size))])
    grid[top:bottom, left:right] = found
    return grid


def round_to_fp8(values: Tensor, scales: Tensor, region: Region) -> Tensor:
    """`values`, the `region` of a matrix with block `scales`, as float8_e4m3fn."""
    (top, bottom), (left, right) = blocks(region)
    rows, columns = (start % BLOCK for start, _ in region)
    of_blocks = scales[top:bottom, left:right]
    of_values = of_blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    of_values = of_values[rows : rows + values.shape[0], columns : columns + values.shape[1]]
    return (values.float() / of_values).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _is_torn(size: tuple[int, ...], region: Region) -> bool:
    """Whether the edges between equal shares cut through blocks; the same for all neighbours."""
    shares = ((stop - start, length) for (start, stop), length in zip(region, size, strict=True))
    return any(share < length and share % BLOCK for share, length in shares)


def _scales(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
