"""The filter, read as the kernel reads it: numbers of both machines, and what becomes of each call.

The numbers are those of Linux's own headers (asm/unistd_64.h and asm-generic/unistd.h).
"""

import errno
import re
import struct
from pathlib import Path

import pytest

from megatron_prime.verify import seccomp

X86_64 = """
access=21 alarm=37 brk=12 clock_getres=229 clock_gettime=228 clock_nanosleep=230 clone=56
clone3=435 close=3 dup=32 dup2=33 dup3=292 exit=60 exit_group=231 faccessat=269 faccessat2=439
fcntl=72 fstat=5 futex=202 getcwd=79 getdents64=217 getegid=108 geteuid=107 getgid=104
getitimer=36 getpid=39 getppid=110 getrandom=318 getrlimit=97 getrusage=98 gettid=186
gettimeofday=96 getuid=102 ioctl=16 lseek=8 lstat=6 madvise=28 membarrier=324 mmap=9 mprotect=10
mremap=25 munmap=11 nanosleep=35 newfstatat=262 open=2 openat=257 pause=34 poll=7 ppoll=271
prctl=157 pread64=17 prlimit64=302 pselect6=270 read=0 readlink=89 readlinkat=267 readv=19
restart_syscall=219 rseq=334 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15
sched_getaffinity=204 sched_yield=24 select=23 set_robust_list=273 setitimer=38 sigaltstack=131
stat=4 statx=332 time=201 times=100 uname=63 write=1 writev=20
"""
AARCH64 = """
brk=214 clock_getres=114 clock_gettime=113 clock_nanosleep=115 clone=220 clone3=435 close=57
dup=23 dup3=24 exit=93 exit_group=94 faccessat=48 faccessat2=439 fcntl=25 fstat=80 futex=98
getcwd=17 getdents64=61 getegid=177 geteuid=175 getgid=176 getitimer=102 getpid=172 getppid=173
getrandom=278 getrlimit=163 getrusage=165 gettid=178 gettimeofday=169 getuid=174 ioctl=29 lseek=62
madvise=233 membarrier=283 mmap=222 mprotect=226 mremap=216 munmap=215 nanosleep=101 newfstatat=79
openat=56 ppoll=73 prctl=167 pread64=67 prlimit64=261 pselect6=72 read=63 readlinkat=78 readv=65
restart_syscall=128 rseq=293 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139
sched_getaffinity=123 sched_yield=124 set_robust_list=99 setitimer=103 sigaltstack=132 statx=291
times=153 uname=160 write=64 writev=66
"""
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000
WRITE, CREATE, TRUNCATE, APPEND, TMPFILE = 0o1, 0o100, 0o1000, 0o2000, 0o20000000
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def fail(number):
    return 0x00050000 | number


def listed(machine):
    pairs = (item.split("=") for item in (X86_64 if machine == "x86_64" else AARCH64).split())
    return {name: int(number) for name, number in pairs}


def verdict(code, arch, number, *arguments):
    """What a classic BPF machine makes of `struct seccomp_data`."""
    full = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<iIQ6Q", number, arch, 0, *(a & (1 << 64) - 1 for a in full))
    program = list(struct.iter_unpack("=HBBI", code))
    at = accumulator = 0
    while True:
        what, if_true, if_false, k = program[at]
        at += 1
        if what == 0x20:  # LD | W | ABS
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif what == 0x06:  # RET
            return k
        else:
            truth = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k}[what]
            at += if_true if truth else if_false


@pytest.fixture(params=sorted(ARCH))
def machine(request):
    return request.param


@pytest.fixture
def ask(machine):
    code, number = seccomp.program(machine, may_open=True), listed(machine)
    return lambda name, *arguments: verdict(code, ARCH[machine], number[name], *arguments)


def test_the_numbers_are_those_of_the_kernel(machine):
    assert seccomp.numbers(machine) == listed(machine)


def test_the_numbers_are_those_of_the_headers_that_are_here(machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]}")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    known = {name: int(number) for name, number in found}
    known.setdefault("newfstatat", known.get("fstatat"))
    assert {name: known[name] for name in seccomp.numbers(machine)} == seccomp.numbers(machine)


def test_only_what_is_listed_passes_with_any_arguments(machine):
    code, guarded = seccomp.program(machine, may_open=True), set(seccomp.GUARDED)
    passing = {number for number in range(1000) if verdict(code, ARCH[machine], number) == ALLOW}
    anyway = {number for name, number in listed(machine).items() if name not in guarded}
    with_zeros = {listed(machine)[name] for name in ("open", "openat", "prlimit64", "fcntl")
                  if name in listed(machine)}  # fmt: skip
    assert passing == anyway | with_zeros


def test_unknown_calls_fail_and_newer_ones_are_not_there(machine):
    code, arch = seccomp.program(machine, may_open=True), ARCH[machine]
    for number in range(1000):
        if number not in listed(machine).values():
            assert verdict(code, arch, number) == fail(
                errno.ENOSYS if number >= 424 else errno.EPERM
            )


def test_other_machines_calls_kill(machine):
    code = seccomp.program(machine, may_open=True)
    for arch in (0x40000003, 0x40000028, *(a for m, a in ARCH.items() if m != machine)):
        assert verdict(code, arch, 0) == KILL
    if machine == "x86_64":
        assert verdict(code, ARCH[machine], 0x40000000) == KILL


def test_files_open_for_reading_only(machine, ask):
    at_cwd = (1 << 64) - 100
    assert ask("openat", at_cwd, 0, 0o2000000 | 0o200000) == ALLOW  # O_CLOEXEC, O_DIRECTORY
    for flag in (WRITE, 0o2, CREATE, TRUNCATE, APPEND, TMPFILE):
        assert ask("openat", at_cwd, 0, flag | 0o2000000) == fail(errno.EROFS)
        if machine == "x86_64":
            assert ask("open", 0, flag) == fail(errno.EROFS)


def test_without_landlock_no_file_opens(machine):
    code = seccomp.program(machine, may_open=False)
    for name in {"open", "openat"} & listed(machine).keys():
        assert verdict(code, ARCH[machine], listed(machine)[name], 0, 0, 0) == fail(errno.EACCES)


def test_threads_but_no_processes(ask):
    assert ask("clone", 0x3D0F00) == ALLOW  # what pthread_create asks for
    assert ask("clone", 17) == fail(errno.EPERM)  # SIGCHLD: fork
    assert ask("clone", 0x4000 | 0x100 | 17) == fail(errno.EPERM)  # vfork
    assert ask("clone3", 0, 88) == fail(errno.ENOSYS)


@pytest.mark.parametrize(
    ("call", "passing", "failing", "error"),
    [
        ("ioctl", (1, 0x5401), (1, 0x5412), errno.ENOTTY),  # TCGETS, TIOCSTI
        ("prlimit64", (0, 7, 0, 1), (0, 7, 1, 0), errno.EPERM),
        ("prlimit64", (9, 7, 0, 1), (9, 7, 1 << 32, 0), errno.EPERM),  # a round address
        ("prlimit64", (0, 3, 0, 1), (9, 3, 1, 0), errno.EPERM),  # another's stack
        ("prctl", (15, 1), (1, 0), errno.EPERM),  # a name, the death signal
        ("prctl", (15, 1), (22, 0), errno.EPERM),
        ("fcntl", (1, 1), (1, 8), errno.EPERM),  # F_GETFD, F_SETOWN
        ("fcntl", (1, 1030), (1, 1031), errno.EPERM),  # F_DUPFD_CLOEXEC, F_SETPIPE_SZ
        ("fcntl", (1, 4), (1, 5), errno.EPERM),  # F_SETFL, F_GETLK
    ],
)
def test_calls_with_some_arguments_only(ask, call, passing, failing, error):
    assert ask(call, *passing) == ALLOW
    assert ask(call, *failing) == fail(error)


def test_a_larger_stack_is_promised_and_not_given(ask):
    assert ask("prlimit64", 0, 3, 1 << 32, 0) == ask("prlimit64", 0, 3, 1, 0) == fail(0)


def test_an_unknown_machine_is_refused():
    with pytest.raises(KeyError):
        seccomp.program("riscv64", may_open=True)
