"""How much memory a piece of work takes at its peak, beside what the process had before (Linux)."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGEST_THRESHOLD = 32 * 2**20  # where glibc's own adjustment ends


def give_back_what_is_freed(at_once: bool) -> None:
    """Whether large blocks go back to the system when they are freed, or may be used again.

    The first shows at a peak what is in use, not how the heap is fragmented; the second is faster.
    """
    malloc = ctypes.CDLL(None)
    malloc.mallopt(_MMAP_THRESHOLD, 2**16 if at_once else _LARGEST_THRESHOLD)
    malloc.mallopt(_TRIM_THRESHOLD, 2**17 if at_once else 2 * _LARGEST_THRESHOLD)
    malloc.malloc_trim(0)


class Extra:
    """Starts to watch this process's resident memory."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before = resident("VmRSS")
        self._shared_before = resident("RssShmem")

    def peak_bytes(self) -> int:
        """At the peak since then, shared memory that the process has touched included."""
        return resident("VmHWM") - self._before

    def private_bytes(self) -> int:
        """The same without shared memory, which stays once it is touched."""
        return self.peak_bytes() - (resident("RssShmem") - self._shared_before)


def resident(what: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, what
    return 1024 * int(found[1])
