"""The checksum against one in plain Python, and against every small fault."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_prime.weights.checksum import checksum

MODULO = 2**64


def in_python(data: bytes) -> int:
    """The same definition with Python's numbers, one after the other."""
    filled = data + bytes(-len(data) % 8)
    numbers = [int.from_bytes(filled[i : i + 8], "little") for i in range(0, len(filled), 8)]
    rows = len(numbers) // 1024
    columns = [sum(numbers[row * 1024 + c] for row in range(rows)) for c in range(1024)]
    of_rows = [sum(numbers[row * 1024 : (row + 1) * 1024]) for row in range(rows)]
    total = len(data)
    for place, number in enumerate([*columns, *of_rows, *numbers[rows * 1024 :]], start=1):
        z = (number + place * 0x9E3779B97F4A7C15) % MODULO
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULO
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULO
        total += z ^ (z >> 31)
    total %= MODULO
    return total - MODULO if total >= MODULO // 2 else total


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4096, 8191, 8192, 8193, 30_000])
def test_the_value_is_the_definitions(count: int) -> None:
    data = random_bytes(count)
    assert int(checksum(data)) == in_python(bytes(data.tolist()))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int64]
)
@pytest.mark.parametrize("size", [(1,), (3, 5), (37, 129), ()], ids=str)
def test_only_bytes_in_row_major_order_count(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    values = (torch.randn(size, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    raw = bytes(values.reshape(-1).view(torch.uint8).tolist())
    assert int(checksum(values)) == in_python(raw)
    assert int(checksum(values.clone().requires_grad_(dtype.is_floating_point))) == in_python(raw)


def test_views_count_as_what_they_show() -> None:
    whole = random_bytes(9000)
    for start, stop in ((1, 9), (3, 8203), (8, 8208), (5, 6)):  # none or some of them aligned
        assert int(checksum(whole[start:stop])) == int(checksum(whole[start:stop].clone()))
    matrix = torch.randn(40, 60)
    for view in (matrix.t(), matrix[:, 7:31], matrix[3::2], matrix[5:9].t()):
        raw = bytes(view.contiguous().view(torch.uint8).flatten().tolist())
        assert int(checksum(view)) == in_python(raw)


@pytest.mark.parametrize("count", [1, 13, 64])
def test_every_flipped_bit_is_seen(count: int) -> None:
    data = random_bytes(count)
    found = {int(checksum(data))}
    for at, bit in itertools.product(range(count), range(8)):
        data[at] ^= 1 << bit
        found.add(int(checksum(data)))
        data[at] ^= 1 << bit
    assert len(found) == 1 + 8 * count


def test_every_flipped_bit_of_a_table_is_seen() -> None:
    """Three rows and a rest: top bits, whose weight vanishes in sums of even multiples, too."""
    numbers = torch.randint(-(2**62), 2**62, (3 * 1024 + 5,), generator=torch.Generator())
    right = int(checksum(numbers))
    for at in (*range(40), *range(1000, 1064), *range(3000, 3077)):
        for bit in (0, 31, 61, 62, 63):
            number = int(numbers[at])
            flipped = (number ^ (1 << bit)) % MODULO
            numbers[at] = flipped - MODULO if flipped >= MODULO // 2 else flipped
            assert int(checksum(numbers)) != right, (at, bit)
            numbers[at] = number
    assert int(checksum(numbers)) == right


@pytest.mark.parametrize("apart", [1, 2**31, 2**62, -(2**63)])  # how two numbers may differ
def test_every_swapped_pair_is_seen(apart: int) -> None:
    """In a table, in the rest, across; along a row, a column and both diagonals."""
    places = [0, 1, 2, 1023, 1024, 1025, 2047, 2048, 2049, 3071, 3072, 3073, 3074]
    for one, other in itertools.combinations(places, 2):
        numbers = torch.zeros(3075, dtype=torch.int64)
        numbers[one] = apart
        right = int(checksum(numbers))
        numbers[one], numbers[other] = 0, apart
        assert int(checksum(numbers)) != right, (one, other)


def test_lengths_and_orders_of_equal_bytes_differ() -> None:
    assert len({int(checksum(torch.zeros(n, dtype=torch.uint8))) for n in range(40)}) == 40
    square = torch.randn(64, 64)
    assert int(checksum(square)) != int(checksum(square.t()))
    rows = torch.randn(16, 2048)
    assert int(checksum(rows)) != int(checksum(rows.flip(0)))
    assert int(checksum(rows)) != int(checksum(rows.roll(1, 0)))
