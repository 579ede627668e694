"""A hash table of 64-bit keys and 32-bit values in flat arrays: 12 bytes a slot, nothing else.

A set of Python ints takes some 70 bytes a key; a data set has sixteen keys a row. Open addressing
with linear probing, doubled when two thirds full, so a key costs 18 to 36 bytes.
"""

from __future__ import annotations

from array import array

_SLOT_BYTES = 12


class KeyTable:
    """Keys to the value they were first added with."""

    def __init__(self, slots: int = 1 << 12) -> None:
        """`slots`: to begin with; a power of two."""
        assert slots & (slots - 1) == 0, "the mask wants a power of two"
        self._used = 0
        self._make(slots)

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return len(self._keys) * _SLOT_BYTES

    def get(self, key: int) -> int | None:
        """The value of `key`; None if it has not been added."""
        slot = self._slot(key or 1)
        return self._values[slot] if self._keys[slot] else None

    def add(self, key: int, value: int) -> None:
        """Remember `key` with `value`, unless it is known."""
        key = key or 1  # 0 marks an empty slot
        slot = self._slot(key)
        if self._keys[slot]:
            return
        self._keys[slot], self._values[slot] = key, value
        self._used += 1
        if 3 * self._used > 2 * len(self._keys):
            self._grow()

    def _slot(self, key: int) -> int:
        """Where `key` is, or belongs."""
        keys, mask = self._keys, self._mask
        slot = (key ^ key >> 32) & mask
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._make(2 * len(keys))
        for key, value in zip(keys, values, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._values[slot] = key, value

    def _make(self, slots: int) -> None:
        self._keys, self._values = array("Q", [0]) * slots, array("I", [0]) * slots
        self._mask = slots - 1
