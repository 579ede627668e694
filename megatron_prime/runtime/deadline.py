"""No phase lasts for ever: when its time is up, every rank writes down where it is, and all end.

A collective that one rank never enters hangs all the others, silently, for as long as the
allocation lasts. So each phase has a deadline (`[deadline]`). The rank that meets one first

    writes the stacks of all its threads to `stuck/rank_00003.txt` in the run folder,
    tells the others over the hub (`hub.py`); each writes its own stacks, then leaves,
    and the job ends with STUCK on every rank.

That is done by a thread, which needs the interpreter's lock. A rank that holds the lock in a native
call that never returns can't run one. For it two clocks of C tick along: faulthandler's, which
writes the stacks without the lock, and a timer of the kernel's, whose function is `_exit`. They are
set a little later, so that an ordinary rank never meets them. The first is also wound up again and
again by the thread: when that could not run for `silent_s`, the stacks are written, too, for then
the others are about to give this rank up (`watchdog.py`).

The file is made when the run begins, for C can't, and removed at its end if nothing is in it.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from megatron_prime.protocols import Phase
from megatron_prime.runtime.exit_timer import ExitTimer
from megatron_prime.runtime.watchdog import STUCK

LOOK_S = 0.25  # between looks at the clock
NATIVE_S = 2.0  # how much later C writes the stacks of who could not
LAST_S = 10.0  # how much later C ends the process; the others have been told by then
LEAVE_S = 30.0  # for a rank that has written its stacks to end in good order


class _Running(NamedTuple):
    phase: Phase
    since: float  # time.monotonic
    limit_s: float


class Deadlines:
    """Of one rank's phases; a context manager, outside of which nothing is watched."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        seconds: Mapping[Phase, float],
        on_stuck: Callable[[str], None],
        silent_s: float = math.inf,
    ) -> None:
        """`folder`: of the run. `on_stuck`, called in a thread, gets a message and ends all."""
        self.path = folder / "stuck" / f"rank_{rank:05d}.txt"
        self._rank, self._seconds, self._on_stuck = rank, seconds, on_stuck
        self._running: _Running | None = None
        self._file: IO[str] | None = None  # while C may have to write
        self._last_resort = ExitTimer(STUCK)
        self._silent_s = silent_s
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._written = False

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The block has the phase's time."""
        self.begin(phase)
        try:
            yield
        finally:
            self.end()

    def begin(self, phase: Phase) -> None:
        """Start the clocks."""
        with self._lock:
            if self._file is not None:
                self._running = _Running(phase, time.monotonic(), self._seconds[phase])
                self._last_resort.set(self._running.limit_s + LAST_S)
                self._wind_up(self._running.limit_s)

    def end(self) -> None:
        """Stop them."""
        with self._lock:
            self._running = None
            if not self._written:  # then the process is ending, and the last resort stays
                faulthandler.cancel_dump_traceback_later()
                self._last_resort.set(0)

    def part(self, stuck: bool) -> None:
        """Another rank ended the run: leave stacks behind if it was `stuck`, else nothing."""
        if stuck:
            self._last_resort.set(LEAVE_S)
            self.write("another rank is stuck")
        else:
            self.close()

    def write(self, why: str) -> None:
        """Append the stacks of all threads to the file, once."""
        with self._lock:
            if self._written:
                return
            self._written = True
            faulthandler.cancel_dump_traceback_later()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            host = socket.gethostname()
            with self.path.open("a") as out:
                out.write(f"{now}  rank {self._rank} on {host}, process {os.getpid()}: {why}\n")
                for thread in threading.enumerate():
                    out.write(f"  thread 0x{thread.ident or 0:016x} is {thread.name}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
                out.write("\n")

    def close(self) -> None:
        """Watch no more. An empty file goes; may be called again, from any thread."""
        self._closed.set()
        with self._lock:
            file, self._file = self._file, None
            if file is None or self._written:
                return
            faulthandler.cancel_dump_traceback_later()
            self._last_resort.set(0)
            file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
                with suppress(OSError):  # others' files are still there
                    self.path.parent.rmdir()

    def _wind_up(self, left_s: float) -> None:
        assert self._file is not None, "only between start and close"
        in_s = min(left_s + NATIVE_S, self._silent_s)
        faulthandler.dump_traceback_later(in_s, file=self._file)

    def _met(self) -> _Running | None:
        """The phase if its time is up; if it is not, C's clock is wound up."""
        with self._lock:
            if (running := self._running) is None or self._file is None or self._written:
                return None
            if (left_s := running.since + running.limit_s - time.monotonic()) <= 0:
                return running
            self._wind_up(left_s)
            return None

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            if (running := self._met()) is None:
                continue
            name = running.phase.value
            self._last_resort.set(LEAVE_S)
            why = f"phase {name} has lasted longer than {running.limit_s:g} s"
            self.write(why)
            self._on_stuck(
                f"{why} on this rank (deadline.{name}_s); the stacks of all ranks are in "
                f"{self.path.parent}: look for the one that does not wait for the others, or "
                f"raise deadline.{name}_s if all of them work"
            )
            return

    def __enter__(self) -> Self:
        """Make the file and start the thread."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a")
        threading.Thread(target=self._watch, name="deadlines", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close whatever happened; errors pass."""
        self.close()
