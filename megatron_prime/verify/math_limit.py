r"""A check that takes too much time ends: first by an exception, then by the end of the process.

The soft limit raises TimeoutError between two steps of Python, so that the worker lives on. Where
one step takes for ever (a power of integers inside a library) the hard limit's signal, for which
there is no handler, kills the process, and the pool starts another. Both count this process's CPU
time: a check does not fail because the machine is busy.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SOFT_S = 0.8
HARD_S = 1.0


class _OutOfTime(BaseException):
    """Not an Exception: libraries survive those."""


@contextmanager
def cpu_limit(soft_s: float = SOFT_S, hard_s: float = HARD_S) -> Iterator[None]:
    """TimeoutError after `soft_s` of user time; the process dies after `hard_s` of CPU time.

    In the main thread of a process alone: signals go nowhere else.
    """
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_PROF, hard_s)
    signal.setitimer(signal.ITIMER_VIRTUAL, soft_s)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"more than {soft_s} s of CPU time") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _OutOfTime
