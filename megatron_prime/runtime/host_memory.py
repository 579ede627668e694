"""How much host memory this process may use: the machine's, or what its cgroup allows.

Slurm and containers put processes into control groups, whose limits psutil does not look at; the
kernel kills what goes beyond them. A group's limit holds for all groups below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def host_bytes(own: Path = OWN, groups: Path = GROUPS) -> int:
    """The least of the machine's memory and of the limits of this process's groups."""
    return min([int(psutil.virtual_memory().total), *limits(own, groups)])


def limits(own: Path, groups: Path) -> Iterator[int]:
    """Those that are set, of the group in which `own` says that we are and of all above it."""
    with suppress(OSError):  # no cgroups
        for line in own.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:  # version 2
                yield from _upwards(groups, group, "memory.max")
            elif "memory" in controllers.split(","):
                yield from _upwards(groups / "memory", group, "memory.limit_in_bytes")


def _upwards(root: Path, group: str, name: str) -> Iterator[int]:
    folder = root / group.lstrip("/")
    for one in (folder, *folder.parents):
        if one.is_relative_to(root):
            with suppress(OSError):  # not there, as at the root, or in a container's view
                text = (one / name).read_text().strip()
                if text.isdigit():  # else "max"; version 1 has a number beyond all memory
                    yield int(text)
