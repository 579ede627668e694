"""Running programs that nobody has read: contained, timed, and closed where it can't be built.

A `Sandbox` starts one fork server (`zygote.py`) and hands it one program at a time. The program's
process may compute; it can't open files but those of Python's own library, nor write any, nor make
processes or sockets, nor send signals (`seccomp.py`, `landlock.py`). It needs neither root nor user
namespaces. Its time, its output and its threads are watched from outside; memory, CPU time, files
and stack have hard limits. Where the kernel lets us build no such thing, `SandboxUnavailable` is
raised, and no program has run.

    with Sandbox() as sandbox:
        outcome = sandbox.run(Program("print(input()[::-1])"), b"abc", seconds=2.0)

One thread at a time. The children die with the process, and with the thread, that made the server.
"""

from __future__ import annotations

import time
from typing import Self

from megatron_prime.verify.fork_server import ForkServer, ServerLost
from megatron_prime.verify.programs import Outcome, Program
from megatron_prime.verify.walls import Isolation, SandboxUnavailable

OUTPUT = 64 << 10  # bytes that a program may always write
PROBE_S = 60.0


class Sandbox:
    """A fork server and the programs it runs; starts with the first. A context manager."""

    def __init__(self, isolation: Isolation | None = None) -> None:
        self._isolation = isolation or Isolation()
        self._server: ForkServer | None = None

    def start(self) -> ForkServer:
        """Build it and let a probe try the walls; SandboxUnavailable if they don't stand."""
        if self._server is None:
            server = ForkServer(self._isolation)
            try:
                self._probe(server)
            except BaseException:
                server.close()
                raise
            self._server = server
        return self._server

    def run(self, program: Program, stdin: bytes, seconds: float, more_output: int = 0) -> Outcome:
        """Run one program for at most `seconds`; it may write OUTPUT + `more_output` bytes.

        Raises SandboxUnavailable, when the program has not run or its end isn't known.
        """
        for last in (False, True):  # the fork server may have been killed for want of memory
            server, started = self.start(), time.monotonic()
            try:
                return server.run(program, stdin, seconds, OUTPUT + more_output)
            except ServerLost as error:
                self.close()
                if time.monotonic() - started >= seconds:
                    return Outcome("timeout", -9, b"")
                if last:
                    raise SandboxUnavailable(error) from error
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """End the fork server and what it runs. May be called again; `run` starts another."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _probe(self, server: ForkServer) -> None:
        try:
            outcome = server.run(Program(_PROBE), b"the probe\n", PROBE_S, OUTPUT)
        except ServerLost as error:
            raise SandboxUnavailable(error) from error
        found = outcome.output.decode(errors="replace")
        holes = "" if self._isolation.kind == "none" else "nothing\n"
        if not (outcome.ok and found.startswith("the probe got: " + holes)):
            raise SandboxUnavailable(f"a harmless program ended with {outcome}")


# Does what must fail, and says what did not.
_PROBE = """
import os, socket
holes = []
for what, attack in {
    "a file": lambda: open("/etc/passwd"),
    "a folder": lambda: os.listdir("/proc"),
    "a file to write": lambda: open("/tmp/probe", "a"),
    "a socket": lambda: socket.socket(),
    "a process": lambda: os.fork() or os._exit(0),
    "a signal to others": lambda: os.kill(os.getppid(), 0),
}.items():
    try:
        attack()
    except OSError:
        continue
    holes.append(what)
print(input(), "got:", ", ".join(holes) or "nothing")
"""
