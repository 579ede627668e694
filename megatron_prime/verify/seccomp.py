"""The system calls that a judged program may make: a seccomp filter, assembled here by hand.

A filter is a small program in the kernel's BPF dialect that sees a call's number and its arguments
as integers, and says what becomes of it. It can't follow pointers: it sees that a file is opened
for reading, not which (`landlock.py` sees that). Ours is an allow-list: computing, memory, reading,
writing to what is open, sleeping, threads. What isn't on the list fails with EPERM, and calls newer
than the list with ENOSYS, so that libc falls back on older ones. There are no processes, sockets,
signals or files to write on it. The list is by name; the numbers are those of the two machines.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

# Name: (x86-64, aarch64); None where the machine hasn't got the call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "dup": (32, 23), "dup3": (292, 24),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "dup2": (33, None),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98), "membarrier": (324, 283),
    "set_robust_list": (273, 99), "rseq": (334, 293), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "alarm": (37, None), "pause": (34, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getrlimit": (97, 163), "getrusage": (98, 165), "times": (100, 153), "uname": (63, 160),
    "exit": (60, 93), "exit_group": (231, 94),
    # Allowed with some arguments only, or refused in a way of their own:
    "open": (2, None), "openat": (257, 56), "clone": (56, 220), "clone3": (435, 435),
    "ioctl": (16, 29), "fcntl": (72, 25), "prlimit64": (302, 261), "prctl": (157, 167),
}  # fmt: skip
GUARDED = ("open", "openat", "clone", "clone3", "ioctl", "fcntl", "prlimit64", "prctl")
NEWEST = 424  # the first call of the numbers that all machines share: younger than the list

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND and the bit of O_TMPFILE: alike on both machines.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
_CLONE_THREAD, _TCGETS, _PR_SET_NAME, _RLIMIT_STACK = 0x10000, 0x5401, 15, 3
_F_SETFL, _F_DUPFD_CLOEXEC = 4, 1030


@dataclass(frozen=True, slots=True)
class Machine:
    """What differs between processors."""

    audit: int  # AUDIT_ARCH_… of <linux/audit.h>
    column: int  # of CALLS


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}


class _Program:
    """Instructions in the order in which they run; jumps count those to skip."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int]] = []

    def add(self, code: int, k: int, if_true: int = 0, if_false: int = 0) -> None:
        self.code.append((code, if_true, if_false, k))

    def returns(self, verdict: int) -> None:
        self.add(_RETURN, verdict)

    def only(self, call: int, argument: int, test: tuple[int, int, bool], error: int) -> None:
        """Allow `call` if its argument passes `test` (code, value, wanted answer), else fail."""
        code, value, wanted = test
        self.add(_EQUAL, call, 0, 4)
        self.add(_LOAD, 16 + 8 * argument)  # the lower half: the argument is an int
        self.add(code, value, *((0, 1) if wanted else (1, 0)))
        self.returns(_ALLOW)
        self.returns(_FAIL | error)

    def new_limits(self, call: int) -> None:
        """prlimit64: limits can be read, nobody's set; for one's own stack it only says so.

        Programs that recurse ask for more stack; they have what there is to be had.
        """
        new = 16 + 8 * 2  # a pointer: both halves count, for it may point to a round address
        self.add(_EQUAL, call, 0, 11)
        for half in (new, new + 4):
            self.add(_LOAD, half)
            self.add(_EQUAL, 0, 0, 3 if half == new else 1)
        self.returns(_ALLOW)
        self.add(_LOAD, 16)
        self.add(_EQUAL, 0, 0, 3)
        self.add(_LOAD, 16 + 8)
        self.add(_EQUAL, _RLIMIT_STACK, 0, 1)
        self.returns(_FAIL | 0)
        self.returns(_FAIL | errno.EPERM)


def numbers(machine: str) -> dict[str, int]:
    """The numbers of the calls that `machine` has."""
    column = MACHINES[machine].column
    return {name: pair[column] or 0 for name, pair in CALLS.items() if pair[column] is not None}


def program(machine: str, may_open: bool) -> bytes:
    """The filter, as an array of `struct sock_filter`; without `may_open` no file opens at all.

    Raises KeyError for a machine whose calls aren't known.
    """
    here, p = MACHINES[machine], _Program()
    number = numbers(machine)
    p.add(_LOAD, 4)  # seccomp_data.arch
    p.add(_EQUAL, here.audit, 1, 0)
    p.returns(_KILL)
    p.add(_LOAD, 0)  # seccomp_data.nr
    if machine == "x86_64":
        p.add(_AT_LEAST, 0x40000000, 0, 1)  # the x32 calls: the same machine, other numbers
        p.returns(_KILL)
    for allowed in sorted(number[name] for name in number if name not in GUARDED):
        p.add(_EQUAL, allowed, 0, 1)
        p.returns(_ALLOW)
    for name, argument in (("open", 1), ("openat", 2)):
        if name in number:
            reading = (_ANY_BIT, _WRITING, False) if may_open else (_AT_LEAST, 0, False)
            p.only(number[name], argument, reading, errno.EROFS if may_open else errno.EACCES)
    p.only(number["clone"], 0, (_ANY_BIT, _CLONE_THREAD, True), errno.EPERM)
    p.only(number["ioctl"], 1, (_EQUAL, _TCGETS, True), errno.ENOTTY)  # isatty
    p.new_limits(number["prlimit64"])
    p.only(number["prctl"], 0, (_EQUAL, _PR_SET_NAME, True), errno.EPERM)  # of a thread
    p.add(_EQUAL, number["fcntl"], 0, 5)
    p.add(_LOAD, 16 + 8)
    p.add(_EQUAL, _F_DUPFD_CLOEXEC, 1, 0)
    p.add(_AT_LEAST, _F_SETFL + 1, 1, 0)
    p.returns(_ALLOW)
    p.returns(_FAIL | errno.EPERM)
    p.add(_AT_LEAST, NEWEST, 0, 1)  # clone3 among them: its flags are behind a pointer
    p.returns(_FAIL | errno.ENOSYS)
    p.returns(_FAIL | errno.EPERM)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in p.code)
