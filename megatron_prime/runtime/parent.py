"""No process outlives the one that started it, however that ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent, `parent`, is gone (Linux).

    Exits at once with a message if it is gone already. Elsewhere than on Linux only that.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        sys.exit(f"parent {parent} is gone")


def take_forks_along() -> None:
    """Let every process that this one forks die with it, and so on with theirs.

    Megatron's checkpoint writers are forks: a rank killed in a save would leave them for ever.
    """
    forker = [os.getpid()]

    def note_forker() -> None:
        forker[0] = os.getpid()

    os.register_at_fork(before=note_forker, after_in_child=lambda: die_with(forker[0]))
