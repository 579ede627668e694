"""Which files a judged program may read: Landlock, the kernel's sandbox for those without rights.

A ruleset says what kinds of access it handles and where they stay allowed; a process that puts
itself under it (`zygote.py`) can never leave, nor can its descendants. Ours handles all there is:
files can be read below the given paths and nowhere else, nothing can be written, no TCP port bound
or reached, no signal sent out. What the kernel can do is asked for (`abi`): version 1 is of Linux
5.13, and where there is none (older kernels, containers that forbid it) the seccomp filter lets
no file be opened at all.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE = 444, 445  # on every machine
_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights the versions handle


def abi() -> int:
    """The kernel's version of Landlock; 0 if there is none to be had."""
    return max(0, int(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def ruleset(readable: Iterable[Path], listable: Iterable[Path] = ()) -> int:
    """A file descriptor of the rules: read below `readable`, list the directories in `listable`.

    Paths that don't exist are left out. Raises OSError if the kernel refuses.
    """
    version = abi()
    attributes = struct.pack(
        "=QQQ",
        (1 << _FILE_RIGHTS[max(1, min(version, 5))]) - 1,
        0b11,  # bind and connect TCP, from version 4
        0b11,  # abstract sockets and signals to others, from version 6
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = int(_LIBC.syscall(_CREATE_RULESET, attributes[:size], ctypes.c_size_t(size), 0))
    if rules < 0:
        raise _refused("landlock_create_ruleset")
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        for path in listable:
            _allow(rules, path, _READ_DIR)
    except OSError:
        os.close(rules)
        raise
    return rules


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # nothing there to be read
        return
    try:
        if not path.is_dir():
            rights &= ~_READ_DIR
        if _LIBC.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0):
            raise _refused(f"landlock_add_rule for {path}")
    finally:
        os.close(place)


def _refused(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
