"""Block-wise FP8 against a loop over blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.weights import fp8_blocks  # noqa: E402
from megatron_prime.weights.fp8_blocks import (  # noqa: E402
    BlockScales,
    largest_values,
    round_to_fp8,
)
from megatron_prime.weights.placement import Region, slices, whole  # noqa: E402

SIZE = (320, 300)  # the last block of each row and column is cut
FP8 = torch.float8_e4m3fn


class Held:
    """What one rank holds of a matrix."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def stretch(self, hf: str) -> Tensor:
        return self.values

    def forget(self) -> None:
        pass


class EmulatedGroup:
    """Two neighbours of whom the other one's message is known beforehand."""

    def __init__(self, others: Tensor | None) -> None:
        self.others, self.asked = others, 0

    def size(self) -> int:
        return 2

    def all_reduce(self, flat: Tensor, how: Any, group: Any) -> None:
        assert group is self
        self.asked += 1
        assert self.others is not None
        flat.copy_(torch.maximum(flat, self.others))


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    spread = torch.randn(SIZE, generator=generator) * 10
    return (torch.randn(SIZE, generator=generator) * spread.exp()).to(dtype)


def by_hand(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and rounded values, block after block."""
    grid = torch.ones(-(-values.shape[0] // 128), -(-values.shape[1] // 128))
    rounded = torch.empty(values.shape, dtype=FP8)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            block = values[part].float()
            if block.abs().max() > 0:
                grid[i, j] = block.abs().max() / 448
            rounded[part] = (block / grid[i, j]).to(FP8)
    return grid, rounded


def scales_of(values: Tensor, region: Region, group: Any = None) -> Tensor:
    return BlockScales.of(Held(values), {"w": region}, {"w": SIZE}, group).grid("w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_values_are_those_of_a_loop(dtype: torch.dtype) -> None:
    values = matrix(dtype)
    scales, rounded = by_hand(values)
    found = scales_of(values, whole(SIZE))
    assert torch.equal(found, scales)
    assert torch.equal(round_to_fp8(values, found, whole(SIZE)).float(), rounded.float())


@pytest.mark.parametrize(
    "region",
    [((128, 256), (0, 300)), ((77, 201), (130, 131)), ((319, 320), (0, 1)), ((0, 320), (256, 300))],
    ids=str,
)
def test_any_region_is_rounded_as_in_the_whole(region: Region) -> None:
    values = matrix()
    scales, rounded = by_hand(values)
    found = round_to_fp8(values[slices(region)], scales, region)
    assert torch.equal(found.float(), rounded[slices(region)].float())


@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_neighbours_agree_on_blocks_that_their_edge_cuts(
    cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = matrix()
    scales, rounded = by_hand(values)
    halves: list[Region] = (
        [((0, 160), (0, 300)), ((160, 320), (0, 300))]
        if cut == "rows"
        else [((0, 320), (0, 150)), ((0, 320), (150, 300))]
    )
    for mine, other in (halves, halves[::-1]):
        others = largest_values(values[slices(other)], other, SIZE).flatten()
        group = EmulatedGroup(others)
        monkeypatch.setattr(fp8_blocks.dist, "all_reduce", group.all_reduce)
        found = scales_of(values[slices(mine)], mine, group)
        assert group.asked == 1
        assert torch.equal(found, scales)
        part = round_to_fp8(values[slices(mine)], found, mine)
        assert torch.equal(part.float(), rounded[slices(mine)].float())


def test_shards_of_whole_blocks_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    group = EmulatedGroup(None)
    monkeypatch.setattr(fp8_blocks.dist, "all_reduce", group.all_reduce)
    size, region = (512, 300), ((256, 512), (0, 300))
    values = torch.randn(256, 300)
    found = BlockScales.of(Held(values), {"w": region}, {"w": size}, group)  # type: ignore[arg-type]
    assert group.asked == 0
    assert torch.equal(found.grid("w")[2:], by_hand(values)[0])


def test_a_block_of_zeros_stays_zero() -> None:
    values = matrix()
    values[128:256, :128] = 0
    scales = scales_of(values, whole(SIZE))
    assert scales[1, 0] == 1
    rounded = round_to_fp8(values, scales, whole(SIZE)).float()
    assert bool((rounded[128:256, :128] == 0).all())
    assert bool(rounded.isfinite().all())


def test_the_error_is_half_a_step_of_e4m3() -> None:
    """Three bits of mantissa: 1/16 of the value; below 2^-6 of e4m3's scale, half of 2^-9."""
    values = matrix()
    scales = scales_of(values, whole(SIZE))
    of_values = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: SIZE[0], : SIZE[1]]
    error = (round_to_fp8(values, scales, whole(SIZE)).float() * of_values - values).abs()
    allowed = torch.maximum(values.abs() / 16, of_values * 2**-10)
    assert bool((error <= allowed * (1 + 1e-6)).all())
    assert float((error / allowed).max()) > 0.9  # the bound is tight: rounded, not cut off


def test_the_largest_value_of_a_block_is_exact() -> None:
    values = matrix()
    scales = scales_of(values, whole(SIZE))
    rounded = round_to_fp8(values, scales, whole(SIZE)).float()
    for i in range(3):
        for j in range(3):
            block = rounded[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert float(block.abs().max()) == 448
