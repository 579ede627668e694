"""An end that needs no Python: a timer of the kernel's whose function is `_exit`.

Imports nothing heavy, so that it can watch over the imports of others.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path


class _SigEvent(ctypes.Structure):
    """`struct sigevent` of Linux, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


_SIGEV_THREAD, _CLOCK_MONOTONIC = 2, 1


class ExitTimer:
    """Ends the process with `code` after a while, without Python (Linux; elsewhere it never does).

    A POSIX timer calls a C function in a thread of its own, with one value as argument. The
    function is `_exit`, the value the exit code. Forked children inherit no timers.
    """

    def __init__(self, code: int) -> None:
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._timer = ctypes.c_void_p()
        if self._libc is not None:
            exit_function = ctypes.cast(self._libc._exit, ctypes.c_void_p)
            event = _SigEvent(code, 0, _SIGEV_THREAD, exit_function, None, b"")
            clock, timer = ctypes.c_int(_CLOCK_MONOTONIC), ctypes.byref(self._timer)
            if self._libc.timer_create(clock, ctypes.byref(event), timer):
                raise OSError("timer_create: the kernel has no timer left; see ulimit -i")

    def set(self, seconds: float) -> None:
        """Count anew, from now; 0 stops."""
        if self._libc is not None:
            whole, rest = divmod(seconds, 1.0)
            interval_and_value = (ctypes.c_long * 4)(0, 0, int(whole), int(rest * 1e9))
            self._libc.timer_settime(self._timer, 0, interval_and_value, None)


def process_age() -> float:
    """Seconds since this process was started, of which Python's own start takes some (Linux).

    Counted since the machine's start, so that a clock that was set right meanwhile does not matter.
    """
    if sys.platform != "linux":
        return 0.0
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
