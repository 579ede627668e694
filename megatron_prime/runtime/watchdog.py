"""When one rank ends, all end within seconds and say why: this rank's side.

A collective with a lost rank hangs, or fails with a message about sockets. So every rank has a
thread with a line to the hub on rank 0 (`hub.py`), over which it hears of the others:

- a rank that fails reports its error before it leaves: `failed`;
- one that is killed or crashes is noticed by its broken line, at once; rank 0 too, by everybody;
- one that is frozen, or whose machine is gone, is noticed by its silence.

Then the thread says `[rank 2] ended because rank 5 on HOST ended: …` and leaves with ENDED (with
STUCK if a phase met its deadline there, see `deadline.py`), without asking the main thread, which
may wait in a collective for ever. It gives that one second: a rank that meets the same error by
itself then keeps quiet about it.

How long may a rank be silent? The thread beats while the main thread waits or computes: torch,
gloo, NCCL and file reads let other Python threads run. Silent is only who holds the interpreter's
lock in one native call: page faults of a memory-mapped file on a stuck file system, the CUDA
driver's start, a compiler inside a library. (On a CPU the longest silence of a whole run was 0.5 s,
in its imports; on GPUs it was not measured.) Such calls stand at the start, so until the steps
begin a rank has STARTING times the patience (`run.lost_after_s`) that it has during steps.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_prime.runtime.hub import Ending, Hub, Line

ENDED = 69  # sysexits' EX_UNAVAILABLE: another rank ended
STUCK = 70  # sysexits' EX_SOFTWARE: a phase lasted longer than its deadline, on any rank
STARTING = 6
GRACE_S = 1.0  # for the main thread to meet the same error
ECHO_S = 15.0  # for the rank that failed to report it: it may have to unwind first
LINGER_S = 5.0  # for the others to leave before rank 0
VERDICT_S = 10.0  # for the hub to say who ended first
STUCK_VERDICT_S = 3.0  # the same, when rank 0 may be stuck itself
SHOW_CURSOR = b"\x1b[?25h"  # the live display hides it, and has no time to bring it back
LONGEST_ERROR = 4000  # characters of it that are passed on


def beat_seconds(lost_after_s: float) -> float:
    """Nine beats have to be lost before a rank is."""
    return min(5.0, lost_after_s / 9)


class Watchdog:
    """This rank's line to the hub; a daemon thread that ends the process when another rank ends."""

    def __init__(
        self,
        rank: int,
        address: tuple[str, int],
        token: str,
        lost_after_s: float,
        timeout_s: float,
        hub: Hub | None = None,
    ) -> None:
        """Join; returns when all ranks have. The process ends, with a message, if some don't come.

        `hub`: the one of this process, on rank 0. Raises OSError if it can't be reached within
        `timeout_s`.
        """
        self.rank = rank
        self._hub = hub
        self._beat_s = beat_seconds(lost_after_s)
        self._line = Line(socket.create_connection(address, timeout=timeout_s))
        self._line.send("hello", rank=rank, host=socket.gethostname(), token=token)
        self._hub_host, self._hub_patience_s = address[0], float("inf")
        self._welcome, self._over = threading.Event(), threading.Event()
        self._known, self._failing = threading.Event(), threading.Event()
        self._telling, self._told = threading.Lock(), False
        self.ending: Ending | None = None
        self.on_end: Callable[[bool], None] = lambda stuck: None  # before the process is ended
        os.register_at_fork(after_in_child=self._line.connection.close)  # it is the parent's
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.be_patient(STARTING * lost_after_s)
        self._thread.start()
        self._await(self._welcome)

    def failed(self, error: str, echo: bool, stuck: bool = False) -> Ending | None:
        """Report this rank's end; who ended first, or None if the hub does not answer.

        An `echo` is an error that another rank's end may have caused, such as a broken connection:
        it is reported only if no other rank turns out to have ended. `stuck`: a deadline passed.
        """
        self._failing.set()
        if echo:
            self._known.wait(ECHO_S)
        if not self._known.is_set():
            self._line.send("failed", error=error[:LONGEST_ERROR], stuck=stuck)
            self._known.wait(STUCK_VERDICT_S if stuck else VERDICT_S)
        return self.ending

    def finish(self) -> None:
        """Part in peace: returns when all ranks have come here."""
        self._line.send("bye")
        self._await(self._over)
        self._line.connection.close()
        self.linger()

    def linger(self) -> None:
        """Let rank 0 leave last: what it told the others could be lost with its connections."""
        if self._hub:
            self._hub.wait(LINGER_S)

    def be_patient(self, seconds: float) -> None:
        """Let the hub allow this rank a silence of `seconds` from now on."""
        self.patience_s = seconds
        self._line.send("beat", patience_s=seconds)
        if self._hub:
            self._hub.be_patient(seconds)

    def tell(self, ending: Ending) -> None:
        """Say that this rank ends because of another, once, whichever thread comes first."""
        with self._telling:
            told, self._told = self._told, True
        if not told:
            say(ended_because(self.rank, ending))

    def heard_of_an_end(self, within_s: float) -> bool:
        """Whether another rank's end is known, or becomes known soon; this process ends then."""
        return self._known.wait(within_s)

    def _await(self, event: threading.Event) -> None:
        while not event.wait(1.0):
            alive = self._thread.is_alive() or event.is_set()  # it may have been set just now
            assert alive, "the watchdog's thread ends the process or sets events"

    def _watch(self) -> None:
        heard, next_beat = time.monotonic(), 0.0
        poll = select.poll()
        poll.register(self._line.connection, select.POLLIN)
        while not self._over.is_set():
            if poll.poll(self._beat_s / 4 * 1000):
                heard = time.monotonic()
                if ending := self._read():
                    self._conclude(ending)
                    return
            elif time.monotonic() - heard > self._hub_patience_s:
                silence = f"no sign of life of it for {time.monotonic() - heard:.0f} s"
                self._conclude(Ending(0, self._hub_host, silence))
                return
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._beat_s
                self._line.send("beat", patience_s=self.patience_s)

    def _read(self) -> Ending | None:
        messages = self._line.receive()
        if messages is None:
            gone = "it was killed (kill -9, out of memory), or it crashed"
            return Ending(0, self._hub_host, gone)
        for message in messages:
            if ending := self._take(**message):
                return ending
        return None

    def _take(self, kind: str, **fields: Any) -> Ending | None:
        if kind == "beat":
            self._hub_patience_s = fields["patience_s"]
        elif kind == "welcome":
            self._welcome.set()
        elif kind == "bye":
            self._over.set()
        elif kind == "ended":
            return Ending(**fields)
        return None

    def _conclude(self, ending: Ending) -> None:
        """End this process, unless its main thread is about to do so by itself."""
        self.ending = ending
        if ending.stuck:
            self.on_end(True)  # while all threads are still where they were
        self._known.set()
        if not self._failing.wait(GRACE_S):
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            self.tell(ending)
            if not ending.stuck:
                self.on_end(False)
            self.linger()
            os._exit(code_of(ending))


def code_of(ending: Ending) -> int:
    """The exit code of a rank that ends because of another."""
    return STUCK if ending.stuck else ENDED


def ended_because(rank: int, ending: Ending) -> str:
    """The line that a rank says which ends because of another."""
    return f"[rank {rank}] ended because rank {ending.rank} on {ending.host} ended: {ending.error}"


def say(line: str) -> None:
    """On stderr, past Python's locks, which a stuck main thread may hold."""
    os.write(2, f"{line}\n".encode(errors="replace"))
