"""No process outlives the one that started it, however that ended.

The kernel's death signal follows the *thread* that forked: it comes also when that thread ends and
its process lives on. So whatever starts children must be a thread that lasts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
# Loaded here: in the fork of a process with threads the loader's lock may be held for ever.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent, `parent`, is gone (Linux).

    Exits at once with a message if it is gone already. Elsewhere than on Linux only that.
    """
    if not _tied_to(parent):
        sys.exit(_gone(parent))


def take_forks_along() -> None:
    """Let every process that this one forks die with it, and so on with theirs.

    Megatron's checkpoint writers are forks: a rank killed in a save would leave them for ever.
    """
    forker = [os.getpid()]

    def note_forker() -> None:
        forker[0] = os.getpid()

    os.register_at_fork(before=note_forker, after_in_child=lambda: fork_dies_with(forker[0]))


def fork_dies_with(parent: int) -> None:
    """`die_with` for a fork hook, where Python ignores every exception, SystemExit too."""
    if not _tied_to(parent):
        os.write(2, f"{_gone(parent)}\n".encode())
        os._exit(1)


def _tied_to(parent: int) -> bool:
    """Ask the kernel for the death signal; whether `parent` was still there to be asked about."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def _gone(parent: int) -> str:
    return f"parent {parent} is gone"
