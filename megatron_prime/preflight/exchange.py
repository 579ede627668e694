"""A board on which ranks pin up what they know: torch's key-value store, and no collective.

Rank 0 serves it, at the address where the ranks of `train` meet, so that address and port are
tested too. Nothing here waits without an end, and nobody has to wait for all ranks to be there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_prime.runtime.rendezvous import Rendezvous

POLL_S = 0.05
SHORTEST_S = 0.01  # torch takes 0 ms for ever
ANSWER_S = 20.0  # for the store's server to answer one request


class Board:
    """A store in which every wait has an end (`until`: a time of time.monotonic)."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def pin(self, key: str, text: str) -> None:
        """Write, for all to read."""
        self.store.set(key, text)

    def read(self, key: str, until: float) -> str | None:
        """What somebody pinned, or pins in time; None: nobody did."""
        return self.read_all([key], until).get(key)

    def read_all(self, keys: Iterable[str], until: float) -> dict[str, str]:
        """What is or gets pinned under `keys`; returns when all is there, or in time with less."""
        missing, found = list(keys), dict[str, str]()
        while True:
            for key in [key for key in missing if self.store.check([key])]:
                found[key] = self.store.get(key).decode()
            missing = [key for key in missing if key not in found]
            if not missing or time.monotonic() >= until:
                return found
            time.sleep(POLL_S)

    def read_at_once(self, key: str, until: float) -> str | None:
        """`read` without the delay of looking now and then; occupies the store meanwhile."""
        while (left := until - time.monotonic()) > 0:
            try:
                self.store.wait([key], timedelta(seconds=max(SHORTEST_S, min(left, 1.0))))
            except dist.DistStoreError:  # not yet
                continue
            return self.store.get(key).decode()
        return None


def meet(here: Rendezvous, serves: bool, until: float) -> Store:
    """The store of all ranks, for this process or thread alone; rank 0 `serves` it, but one time.

    Raises dist.DistError if it can't be served, or not be reached in time.
    """
    if here.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        here.master_addr,
        here.master_port,
        None,
        serves,
        timedelta(seconds=max(1.0, until - time.monotonic())),
        wait_for_workers=False,
    )
    store.set_timeout(timedelta(seconds=ANSWER_S))
    return PrefixStore(f"preflight_{here.attempt}", store)
