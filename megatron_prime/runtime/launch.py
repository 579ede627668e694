"""From started processes to a run that begins and ends as one.

`join` brings the ranks together before the heavy imports, in a store (torch's key-value server,
where the process groups meet later) and under a watchdog. `Launch` is what a command gets, and how
`__main__` ends: in peace, with an error, or because somebody asked for it.
"""

from __future__ import annotations

import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_prime.config import ConfigError, DeadlineSection
from megatron_prime.errors import OtherRankFailed, RunError
from megatron_prime.protocols import Phase
from megatron_prime.runtime.deadline import Deadlines
from megatron_prime.runtime.hub import Hub
from megatron_prime.runtime.rendezvous import Rendezvous
from megatron_prime.runtime.signals import SAVED, StopSignals
from megatron_prime.runtime.watchdog import (
    SHOW_CURSOR,
    STARTING,
    STUCK,
    Watchdog,
    beat_seconds,
    code_of,
    say,
)

SILENT = 0.8  # of `run.lost_after_s`: a rank as silent as that leaves its stacks behind
STACKS_S = 0.5  # for the others to write their stacks before connections to this rank break


class RanksDontMeet(RunError, OSError):
    """No way to rank 0 within `run.timeout_s`."""


class Launch:
    """This process among the ranks of a run."""

    def __init__(
        self, here: Rendezvous, lost_after_s: float, timeout_s: float, saves: bool
    ) -> None:
        """Join the others; returns when all are there. Raises RanksDontMeet if rank 0 is not.

        `saves`: the command has checkpoints, so that it is worth starting again.
        """
        self.here = here
        self.store: Store | None = None
        self._lost_after_s = lost_after_s
        self._watchdog: Watchdog | None = None
        self._saves = saves
        if here.world_size > 1:
            try:
                self._join(timeout_s)
            except (OSError, dist.DistError) as error:
                raise RanksDontMeet(
                    f"found no rank 0 at {here.master_addr}:{here.master_port} within "
                    f"run.timeout_s = {timeout_s:g} s ({error}); see whether all ranks were "
                    "started, and whether that address is reached from this machine"
                ) from error
        self.signals = StopSignals(self._left)

    def _join(self, timeout_s: float) -> None:
        here = self.here
        store, _, _ = next(
            rendezvous(
                f"tcp://{here.master_addr}:{here.master_port}",
                here.rank,
                here.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        )
        # torchrun's store outlives the ranks: what a former attempt left in it is not for this one.
        self.store = PrefixStore(f"attempt_{here.attempt}", store)
        hub = None
        if here.rank == 0:
            beat_s = beat_seconds(self._lost_after_s)
            several = here.world_size > here.local_world_size
            hub = Hub(here.master_addr, here.world_size, beat_s, timeout_s, several)
            self.store.set("hub", f"{hub.port} {hub.token}")
        port, token = self.store.get("hub").decode().split()
        address = here.master_addr, int(port)
        self._watchdog = Watchdog(here.rank, address, token, self._lost_after_s, timeout_s, hub)

    @contextmanager
    def steps(self, agree: Callable[[int], int] | None) -> Iterator[None]:
        """The part where no rank is silent for long. `agree`: signals wait until the loop asks."""
        self._be_patient(self._lost_after_s)
        if agree is None:
            yield
        else:
            with self.signals.remembered(agree):
                yield
        self._be_patient(STARTING * self._lost_after_s)

    def finish(self) -> None:
        """End in peace, when all ranks have come here."""
        if self._watchdog:
            self._watchdog.finish()

    def failed(self, error: BaseException) -> int:
        """Report `error` to the other ranks, or learn whose it is; say so once. The exit code."""
        code = self._report(error)
        if self._watchdog:
            self._watchdog.linger()
        return code

    def _report(self, error: BaseException) -> int:
        meant, echo, rank = isinstance(error, RunError), is_echo(error), self.here.rank
        line = str(error) if meant else traceback.format_exception_only(error)[-1].strip()
        trace = "" if meant else "".join(traceback.format_exception(error))
        ending = self._watchdog.failed(line, echo) if self._watchdog else None
        if self._watchdog and ending and echo and ending.rank != rank:
            self._watchdog.tell(ending)
            return code_of(ending)
        if ending and echo and ending.stuck:
            return STUCK  # it is this rank that was; the deadlines' thread has said so
        if ending and ending.rank == rank and not line.startswith(ending.error):
            say(f"[rank {rank}] the others ended without this rank: {ending.error}")
        elif ending is None or ending.rank == rank or not line.startswith(ending.error):
            say(f"{trace}[rank {rank}] {line}")  # else the other rank says it
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT
        return 2 if isinstance(error, ConfigError) else 1

    def deadlines(self, folder: Path, knobs: DeadlineSection) -> Deadlines:
        """Of this rank's phases; when one passes, on any rank, all write their stacks and end."""
        seconds = {phase: getattr(knobs, f"{phase.value}_s") for phase in Phase}
        silent_s = SILENT * self._lost_after_s if self._watchdog else math.inf
        deadlines = Deadlines(folder, self.here.rank, seconds, self._stuck, silent_s)
        if self._watchdog:
            self._watchdog.on_end = deadlines.part
        return deadlines

    def _stuck(self, error: str) -> None:
        """End now: a phase of this rank met its deadline. Runs in the deadlines' thread."""
        rank, watchdog = self.here.rank, self._watchdog
        ending = watchdog.failed(error, echo=False, stuck=True) if watchdog else None
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
        if watchdog and ending and ending.rank != rank:
            watchdog.tell(ending)
        else:
            say(f"[rank {rank}] {error}")
        if watchdog:
            time.sleep(STACKS_S)
            watchdog.linger()
        os._exit(code_of(ending) if ending else STUCK)

    def _left(self, number: signal.Signals) -> None:
        """End now: a signal came where nothing can be saved. Runs in the signals' thread."""
        if self._watchdog and self._watchdog.heard_of_an_end(within_s=2.0):
            return  # torchrun's way to end the other ranks: the watchdog tells why it happened
        again = "the same command starts it again" if self._saves else "it has no checkpoints"
        line = f"{number.name}: ended at once, for there is nothing to save here; {again}"
        ending = self._watchdog.failed(line, echo=False) if self._watchdog else None
        if ending is None or ending.rank == self.here.rank:
            say(f"[rank {self.here.rank}] {line}")
        if self._watchdog:
            self._watchdog.linger()
        os._exit(SAVED if self._saves else 128 + number)

    def _be_patient(self, seconds: float) -> None:
        if self._watchdog:
            self._watchdog.be_patient(seconds)


def is_echo(error: BaseException) -> bool:
    """Whether `error` is only what another rank's looks like from here: a broken connection."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (dist.DistError, OtherRankFailed)) or "gloo/transport" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
