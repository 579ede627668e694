"""A checksum of a tensor's bytes that is as fast as reading them, on any device.

The bytes are taken as 64-bit numbers and written into rows of 1024. The sums of all columns and of
all rows modulo 2^64, and the numbers of the last, short row, are mixed with their places by a
function that makes a random-looking number of each (splitmix64's), and added. A changed number
changes its row's sum and its column's; two that swap places, those of two rows or two columns. So
either is missed once in 2^64 cases. It guards against mistakes and faults, not against somebody who
wants to deceive it. Only torch is imported: the module runs inside SGLang's processes, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 1024
_BYTES = 8
_STEP = 0x9E3779B97F4A7C15 - 2**64  # odd; as int64, like the two factors
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def checksum(values: Tensor) -> Tensor:
    """Of the values' bytes in row-major order: int64 scalar on their device."""
    data = values.detach().contiguous().flatten().view(torch.uint8)
    nbytes = data.numel()
    if missing := -nbytes % _BYTES:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % _BYTES:
        data = data.clone()
    numbers = data.view(torch.int64)
    full = numbers.numel() // _COLUMNS * _COLUMNS
    table = numbers[:full].view(-1, _COLUMNS)
    return _mixed(torch.cat([table.sum(0), table.sum(1), numbers[full:]])).sum() + nbytes


def _mixed(sums: Tensor) -> Tensor:
    """A random-looking number for each number and its place, one to one for a place."""
    mixed = torch.arange(1, sums.numel() + 1, dtype=torch.int64, device=sums.device)
    mixed = mixed.mul_(_STEP).add_(sums)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = mixed.bitwise_xor_(_shifted(mixed, shift)).mul_(factor)
    return mixed.bitwise_xor_(_shifted(mixed, 31))


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (numbers >> by).bitwise_and_(2 ** (64 - by) - 1)
