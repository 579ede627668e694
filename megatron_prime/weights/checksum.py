"""A checksum of a tensor's bytes that is as fast as reading them, on any device.

The bytes are taken as 64-bit numbers and written into rows of 1024. The sums of all rows and of all
columns, weighted with odd numbers, are added modulo 2^64. Any one changed number changes it, and so
do any two that swap places: they differ in their row or in their column. It guards against mistakes
and faults, not against somebody who wants to deceive it. Only torch is imported: the module runs
inside SGLang's processes, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 1024
_BYTES = 8


def checksum(values: Tensor) -> Tensor:
    """Of the values' bytes in row-major order: int64 scalar on their device."""
    data = values.detach().contiguous().flatten().view(torch.uint8)
    missing = -data.numel() % _BYTES
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % _BYTES:
        data = data.clone()
    numbers = data.view(torch.int64)
    full = numbers.numel() // _COLUMNS * _COLUMNS
    table = numbers[:full].view(-1, _COLUMNS)
    return (
        _weighted(numbers[full:], 3)
        + _weighted(table.sum(0), 5)
        + _weighted(table.sum(1), 7)
        + values.numel()
    )


def _weighted(sums: Tensor, first: int) -> Tensor:
    """Sum of the numbers times odd weights that differ from place to place."""
    weights = torch.arange(sums.numel(), dtype=torch.int64, device=sums.device) * 2 + first
    return (sums * (weights * 0x9E3779B97F4A7C1)).sum()
