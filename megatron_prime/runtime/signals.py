"""SIGTERM and SIGUSR1: somebody wants the run to end soon, and to lose nothing.

While the loop runs, a signal is remembered; at the end of the step the ranks agree on whether any
of them got one (`asked`), save, and leave with SAVED. Where nothing could be saved, before the
first step or in a stage without checkpoints, `leave` is called at once.

Python runs a signal's handler in the main thread between two steps of the interpreter, which may be
a long time if that waits in a collective. So what reacts is a thread of our own, woken by
`set_wakeup_fd`: a byte with the signal's number, written by the C handler the moment it arrives.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAVED = 75  # sysexits' EX_TEMPFAIL: not done, run the same command again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """What has been asked of this rank, and of any."""

    def __init__(self, leave: Callable[[signal.Signals], None]) -> None:
        """Watch from now on; call in the main thread. `leave` runs in another one."""
        self._leave = leave
        self._seen = 0
        self._loop_saves = False
        self._agree: Callable[[int], int] = int  # of a run of one rank
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # only a signal with a handler wakes
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    @contextmanager
    def remembered(self, agree: Callable[[int], int]) -> Iterator[None]:
        """Inside, signals wait for `asked`; `agree` gives the largest of all ranks' numbers."""
        self._agree, self._loop_saves = agree, True
        yield
        self._loop_saves = False
        if self._seen:  # it came after the loop had asked for the last time
            self._leave(signal.Signals(self._seen))

    def asked(self) -> str | None:
        """The name of the signal if any rank got one, on all ranks alike; collective."""
        number = self._agree(self._seen)
        return signal.Signals(number).name if number else None

    def _wait(self) -> None:
        while byte := self._reader.recv(1):
            if byte[0] not in STOP_SIGNALS:  # SIGINT has a handler too, Python's
                continue
            self._seen = byte[0]
            if not self._loop_saves:
                self._leave(signal.Signals(byte[0]))


def block_stop_signals() -> None:
    """Keep them from processes that this thread starts: Slurm sends a signal to all there are."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
