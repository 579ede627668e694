"""Duplicates, exact and near, from hashes alone: no text is kept.

Exact: the same normal form. Near: MinHash (Broder 1997) over sets of 5 characters, compared by
locality-sensitive hashing in 14 bands of 8 values (the banding of FineWeb, arXiv 2406.17557), so
that two texts of Jaccard similarity s meet with probability 1 - (1 - s⁸)¹⁴: 5 % at 0.5, 56 % at
0.7, 92 % at 0.8, 99.96 % at 0.9. Problems, unlike web pages, differ by a single number: `What is
3+5?` and `What is 3+6?` are two. So near duplicates must also have the same numbers in the same
order, and the same ground truth if they are mathematics.

Sixteen keys a kept item in a KeyTable: 290 to 580 bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_prime.prepare.items import Dropped, Item, drop
from megatron_prime.prepare.key_table import KeyTable
from megatron_prime.prepare.text import digest, normal_form, numbers

SHINGLE = 5  # bytes of the normal form
BANDS, ROWS = 14, 8

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_HIGH = np.uint64(32)


class Seen:
    """The items seen so far; `check` says of a new one whether it is among them."""

    def __init__(self, near: bool = True) -> None:
        """`near=False` looks for exact duplicates only."""
        self._near = near
        self._table = KeyTable()
        self._places = _Places()

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return self._table.nbytes

    def check(self, item: Item) -> Item | Dropped:
        """The item, now seen, or which earlier one it repeats."""
        form = normal_form(item.text)
        truth = normal_form(item.ground_truth) if item.ability == "math" else ""
        text_key, both_key = digest(f"text\n{form}"), digest(f"both\n{form}\n{truth}")
        if (earlier := self._table.get(both_key)) is not None:
            return drop(item, "duplicate", f"is that of {self._places.name(earlier)}")
        if (earlier := self._table.get(text_key)) is not None:
            where = self._places.name(earlier)
            return drop(item, "conflict", f"is that of {where}, which has another ground truth")
        keys = [text_key, both_key]
        if self._near:
            bands = band_keys(form, "\n".join([truth, *numbers(item.text)]))
            for key in bands:
                if (earlier := self._table.get(key)) is not None:
                    return drop(item, "near_duplicate", f"is like {self._places.name(earlier)}")
            keys += bands
        number = self._places.number(item)
        for key in keys:
            self._table.add(key, number)
        return item


class _Places:
    """Numbers for the rows of all files, so that a hash can lead back to a place."""

    def __init__(self) -> None:
        self._files: list[tuple[int, str, str]] = []  # first number, name, kind of place
        self._next = 0

    def number(self, item: Item) -> int:
        kind = "row" if item.place.endswith(f" row {item.number}") else "line"
        if not self._files or self._files[-1][1] != item.file:
            self._files.append((self._next, item.file, kind))
        first = self._files[-1][0]
        self._next = max(self._next, first + item.number + 1)
        return first + item.number

    def name(self, number: int) -> str:
        first, file, kind = next(entry for entry in reversed(self._files) if entry[0] <= number)
        return f"{file} {kind} {number - first + (kind == 'line')}"


def band_keys(form: str, context: str) -> list[int]:
    """Keys that near duplicates are likely to share; never with another `context`."""
    values = min_hashes(form).reshape(BANDS, ROWS)
    salt = digest(context)
    return [digest(f"{salt} {band} {values[band].tobytes().hex()}") for band in range(BANDS)]


def min_hashes(form: str) -> NDArray[np.uint64]:
    """The least of each of BANDS × ROWS hashes over the shingles of a normal form."""
    data = np.frombuffer(form.encode(errors="replace").ljust(SHINGLE), np.uint8)
    shingles = np.zeros(len(data) - SHINGLE + 1, np.uint64)
    for offset in range(SHINGLE):
        shingles = shingles << np.uint64(8) | data[offset : offset + len(shingles)]
    mixed = _mixed(np.unique(shingles))
    least = np.empty(BANDS * ROWS, np.uint64)
    for start in range(0, len(least), ROWS):  # a long text times all functions at once is too much
        hashes = mixed[None] * _FACTORS[start : start + ROWS, None]
        least[start : start + ROWS] = (
            (hashes + _OFFSETS[start : start + ROWS, None]) >> _HIGH
        ).min(1)
    return least


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: neighbours become unrelated numbers."""
    for shift, factor in zip(_SHIFTS, _MIX, strict=False):
        values = (values ^ values >> shift) * factor
    return values ^ values >> _SHIFTS[2]


def _constants(what: str, odd: int) -> NDArray[np.uint64]:
    return np.array([digest(f"{what} {i}") | odd for i in range(BANDS * ROWS)], np.uint64)


_FACTORS, _OFFSETS = _constants("factor", 1), _constants("offset", 0)
