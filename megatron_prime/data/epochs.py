"""Endless mini-batches of a data set that is small enough to be known whole, to be resumed.

Each epoch has every item once, in an order of its own that seed and epoch number fix; the items
that don't fill a last mini-batch are left out of it. So the number of mini-batches taken says where
the stream stands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from megatron_prime.data.rows import DataError

Item = TypeVar("Item")


class Epochs(Generic[Item]):
    """Mini-batches of `count` items, for a loop and its checkpoints."""

    def __init__(
        self,
        items: Sequence[Item],
        count: int,
        seed: int,
        fingerprint: Callable[[Sequence[Item]], str],
        found: str,
    ) -> None:
        """`found` names the items and the knob that says `count`, for messages.

        DataError if there are not even `count` items.
        """
        if count > len(items):
            raise DataError(f"found {len(items)} {found} = {count}; lower it, or bring more data")
        self._items, self._count, self._seed = tuple(items), count, seed
        self._fingerprint = fingerprint(self._items)
        self._taken = 0  # mini-batches
        self._order: list[Item] = []  # of the epoch of `_epoch`
        self._epoch = -1

    def take(self) -> list[Item]:
        """The next mini-batch."""
        epoch, place = divmod(self._taken, len(self._items) // self._count)
        if epoch != self._epoch:
            self._order, self._epoch = list(self._items), epoch
            random.Random(self._seed * 1_000_003 + epoch).shuffle(self._order)
        self._taken += 1
        return self._order[place * self._count : (place + 1) * self._count]

    @property
    def epochs(self) -> float:
        """How often each item was taken, on average."""
        return self._taken * self._count / len(self._items)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain values that JSON can hold."""
        return {"taken": self._taken, "items": len(self._items), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; DataError if it was of other items."""
        if (state["items"], state["fingerprint"]) != (len(self._items), self._fingerprint):
            raise DataError(
                f"found a checkpoint of a run on {state['items']} examples (fingerprint "
                f"{state['fingerprint']}), wanted the present {len(self._items)} (fingerprint "
                f"{self._fingerprint}); restore the data, its template and its longest length, or "
                "start a new run.folder"
            )
        self._taken = int(state["taken"])
