"""The fork server of the sandbox: a warm Python that makes one confined child per program.

Started by `sandbox.py` as a script of its own (`python -S -P zygote.py …`), with an empty
environment; it imports nothing of this package, so that a fork of it has nothing to find. It sees
neither programs nor their output: those go from the verifier to the child and back through file
descriptors that are passed along, so one program can't read in its memory what another one wrote.

Each child takes on, in this order: a session of its own, death with the zygote, no core dumps, no
capabilities, limits on memory, CPU time, files and stack, Landlock, seccomp. Then it says "+" on
the result pipe, and only then looks at the program. Where any of it fails, it says why and ends.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import platform
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import types
from typing import Any, NoReturn

PRELOADED = """abc argparse array ast base64 binascii bisect calendar cmath codecs collections
collections.abc colorsys concurrent.futures contextlib contextvars copy csv dataclasses datetime
decimal difflib dis encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16
encodings.utf_32 enum errno fnmatch fractions functools getpass glob graphlib hashlib heapq hmac
html inspect io itertools json keyword linecache locale logging math numbers operator os pathlib
pickle platform pprint queue random re reprlib resource sched secrets select shlex shutil signal
stat statistics string struct sys tempfile textwrap threading time timeit tokenize traceback types
typing unicodedata uuid warnings weakref zlib"""
NUMPY = """numpy numpy.fft numpy.linalg numpy.ma numpy.polynomial numpy.random"""

# What the released verifier puts before every program: models forget imports, and learn to.
STARRED = """string re datetime collections heapq bisect copy math random statistics itertools
functools operator io sys json typing"""
RECURSION_LIMIT = 600_000

MAX_THREADS = 64
LOOK_EVERY_MS = 10  # at how many threads there are
STACK = 64 << 20  # bytes
OPEN_FILES = 32
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_LANDLOCK_RESTRICT_SELF = 446
_CAPSET = {"x86_64": 126, "aarch64": 91}
_INTEGER = re.compile("-?[0-9]+")
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    """Serve until the verifier closes the channel or dies."""
    _call("prctl", _LIBC.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["parent"]:
        sys.exit("the verifier is gone")
    prelude = _warm_up(settings["numpy"])
    if settings["filter"] is not None:
        _call("prctl", _LIBC.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _prefer_me_when_memory_is_short()
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only a signal with a handler wakes
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    channel = socket.socket(fileno=settings["channel"])
    settings["memory"] += _address_space()  # what is given is the program's own
    settings["zygote"] = os.getpid()
    channel.send(b'{"ready": true}')
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1000, 5)
        if not message:
            return
        order = json.loads(message)
        if "kill" in order:  # it came when that program had already ended
            continue
        try:
            child = os.fork()
        except OSError as error:  # of this machine, not of the program
            reply = {"run": order["run"], "error": f"fork: {error}"}
        else:
            if child == 0:
                _be_the_program(descriptors, order["seconds"], settings, prelude)
            reply = {"run": order["run"], **_watch(child, order["run"], channel, woken)}
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(json.dumps(reply).encode())


def _warm_up(numpy_from: str | None) -> dict[str, Any]:
    """Import what programs use; the names that they get without asking."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    if numpy_from is not None:
        sys.path.append(numpy_from)
        for name in NUMPY.split():
            importlib.import_module(name)
        sys.path.remove(numpy_from)
    prelude: dict[str, Any] = {}
    for name in STARRED.split():
        module = importlib.import_module(name)
        public = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        prelude.update({n: getattr(module, n) for n in public if not hasattr(builtins, n)})
    prelude.update({name: sys.modules[name] for name in STARRED.split()})
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as `site` would, which was left out
    sys.argv = ["program.py"]
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.set_int_max_str_digits(0)
    gc.collect()
    gc.freeze()  # the children's collections leave these pages shared
    return prelude


def _prefer_me_when_memory_is_short() -> None:
    with open("/proc/self/oom_score_adj", "w") as score:  # inherited by the children
        score.write("1000")


def _address_space() -> int:
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[0]) * resource.getpagesize()


def _watch(child: int, run: int, channel: socket.socket, woken: int) -> dict[str, Any]:
    """Wait for the end of `child`, and bring it about if asked or if it has too many threads."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.register(woken, select.POLLIN)
    crowded = False
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        ready = [descriptor for descriptor, _ in poll.poll(LOOK_EVERY_MS)]
        if channel.fileno() in ready:
            message = channel.recv(1000)
            if not message:
                sys.exit()  # the verifier is gone, and the child goes with this process
            if json.loads(message)["kill"] == run:
                os.kill(child, signal.SIGKILL)
        elif not ready and _threads(child) > MAX_THREADS:
            crowded = True
            os.kill(child, signal.SIGKILL)
        if woken in ready:
            os.read(woken, 1000)
    with contextlib.suppress(OSError):  # it left nothing behind; without walls it might
        os.killpg(child, signal.SIGKILL)
    _, status, _ = os.wait4(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "crowded": crowded}


def _threads(child: int) -> int:
    try:
        with open(f"/proc/{child}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[17])
    except OSError:  # it has just ended
        return 0


def _be_the_program(
    descriptors: list[int], seconds: float, settings: dict[str, Any], prelude: dict[str, Any]
) -> NoReturn:
    try:
        _place([*descriptors, settings["rules"]])
        try:
            _confine(seconds, settings)
        except BaseException as error:
            os.write(4, f"-{error}".encode())
            os._exit(1)
        os.write(4, b"+")
        length = os.fstat(3).st_size
        order = json.loads(os.pread(3, length, 0))
        os.close(3)
        os._exit(_run(order, prelude))
    finally:
        os._exit(1)


def _place(descriptors: list[int | None]) -> None:
    """Stdin and so on where programs look; 3 is the request, 4 the result, 5 Landlock's rules."""
    high = 100  # beyond what is open
    for number, descriptor in enumerate(descriptors):
        if descriptor is not None:
            os.dup2(descriptor, high + number)
    for number, place in enumerate((3, 0, 1, 4, 2, 5)):
        if descriptors[number] is not None:
            os.dup2(high + number, place)
    os.closerange(5 if descriptors[5] is None else 6, high + len(descriptors))


def _confine(seconds: float, settings: dict[str, Any]) -> None:
    """Everything the docstring above lists."""
    _call("prctl", _LIBC.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["zygote"]:
        raise OSError("the zygote is gone")
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    cpu_s = int(seconds) + 2
    for what, limit in (
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_STACK, STACK),
        (resource.RLIMIT_CPU, cpu_s),  # a backstop: the verifier's clock is the one that counts
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, allowed = resource.getrlimit(what)
        if allowed != resource.RLIM_INFINITY:
            limit = min(limit, allowed)
        resource.setrlimit(what, (limit, limit))
    _call("prctl", _LIBC.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)
    if settings["filter"] is None:
        return
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3
    _call("capset", _LIBC.syscall, _CAPSET[platform.machine()], header, none)
    if settings["rules"] is not None:
        _call("landlock_restrict_self", _LIBC.syscall, _LANDLOCK_RESTRICT_SELF, 5, 0)
        os.close(5)
    code = ctypes.create_string_buffer(bytes.fromhex(settings["filter"]))
    filter_ = struct.pack("@HP", (len(code) - 1) // 8, ctypes.addressof(code))
    _call("seccomp", _LIBC.prctl, _PR_SET_SECCOMP, 2, filter_, 0, 0)


def _call(name: str, function: Any, *arguments: Any) -> None:
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if function(*longs):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _run(order: dict[str, Any], prelude: dict[str, Any]) -> int:
    """The program's exit status. Whatever it does to this process, it does to its own score."""
    is_script = order["name"] is None
    module = types.ModuleType("__main__" if is_script else "solution")
    vars(module).update(prelude, __file__="program.py")
    vars(module).pop(order["name"], None)  # a program without `gcd` has not written one
    sys.modules[module.__name__] = module
    value, status = b"", 0
    try:
        exec(compile(order["source"], "program.py", "exec", dont_inherit=True), vars(module))
        if not is_script:
            value = json.dumps(_called(module, order), default=_plain).encode()
    except SystemExit as asked:
        status = 1 if asked.code else 0
    except BaseException:
        status = 1
    for its_end in (getattr(threading, "_shutdown"), atexit._run_exitfuncs):  # noqa: B009
        its_end()  # threads that are no daemons are waited for
    _flush(module)
    while value:
        value = value[os.write(4, value) :]
    return status


def _flush(module: types.ModuleType) -> None:
    """As Python does in the end, also for files that the program opened and left to it."""
    own = [v for v in vars(module).values() if type(v) in (io.TextIOWrapper, io.BufferedWriter)]
    for stream in (sys.stdout, sys.__stdout__, *own):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def _called(module: types.ModuleType, order: dict[str, Any]) -> Any:
    owner = getattr(module, "Solution", None)
    function = getattr(owner() if isinstance(owner, type) else module, order["name"], None)
    if function is None:
        function = getattr(module, order["name"])
    return function(*map(_with_integer_keys, json.loads(order["arguments"])))


def _with_integer_keys(argument: Any) -> Any:
    """JSON made strings of the keys; the released verifier takes that back, and so must we."""
    if isinstance(argument, dict) and all(map(_INTEGER.fullmatch, argument)):
        return {int(key): value for key, value in argument.items()}
    return argument


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's; anything else is no answer."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
