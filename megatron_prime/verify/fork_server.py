"""The process of `zygote.py` seen from outside: programs go in, their ends come out.

It runs one program at a time. This side holds the clock and reads the output, so that neither a
program that is silent for ever nor one that never is can hold up the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_prime.verify import walls
from megatron_prime.verify.programs import End, Outcome, Program
from megatron_prime.verify.walls import Isolation, SandboxUnavailable

START_S = 120.0  # a cold shared file system can take long over the imports
END_S = 5.0  # from the kill to the report; a process with much memory is not gone at once
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
ZYGOTE = Path(__file__).with_name("zygote.py")
COMMAND = [sys.executable, "-S", "-P", "-B", "-X", "utf8", str(ZYGOTE)]


class ServerLost(Exception):
    """The fork server is gone or babbles."""


class ForkServer:
    """Starts the process and waits until it is ready; SandboxUnavailable if it isn't."""

    def __init__(self, isolation: Isolation) -> None:
        self._count = 0
        settings, rules = walls.build(isolation)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings |= {"parent": os.getpid(), "channel": theirs.fileno()}
        passed = [theirs.fileno()] if rules is None else [theirs.fileno(), rules]
        try:
            self._process = subprocess.Popen(
                [*COMMAND, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=passed,
                env=ENVIRONMENT,
                cwd="/",
            )
        finally:
            theirs.close()
            if rules is not None:
                os.close(rules)
        try:
            self._report(time.monotonic() + START_S)
        except ServerLost as error:
            self.close()
            raise SandboxUnavailable(error) from error

    def run(self, program: Program, stdin: bytes, seconds: float, most_output: int) -> Outcome:
        """One program, for at most `seconds` and so many bytes.

        Raises ServerLost, and SandboxUnavailable if it has not run.
        """
        self._count += 1
        out, their_out = os.pipe()
        result, their_result = os.pipe()
        request, given = _memory_file(program.to_bytes()), _memory_file(stdin)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        theirs = [their_out, their_result, request, given, nowhere]
        run = _Run(self._count, most_output, [out, result])
        try:
            stdout = their_out if program.name is None else nowhere
            order = json.dumps({"run": run.number, "seconds": seconds}).encode()
            try:
                socket.send_fds(
                    self._channel, [order], [request, given, stdout, their_result, nowhere]
                )
            except OSError as error:
                raise ServerLost(f"the fork server takes no orders ({error})") from error
            while theirs:
                os.close(theirs.pop())
            self._follow(run, time.monotonic() + seconds)
        finally:
            for descriptor in (*theirs, out, result):
                os.close(descriptor)
        said = bytes(run.read[result])
        if not said.startswith(b"+") and run.end != "timeout":  # else it had no time to begin
            why = said[1:].decode(errors="replace") or f"exit status {run.status}"
            raise SandboxUnavailable(f"the walls did not stand ({why})")
        return Outcome(run.end, run.status or 0, said[1:] if program.name else bytes(run.read[out]))

    def close(self) -> None:
        """Kill and reap it; what it runs dies with it."""
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _follow(self, run: _Run, deadline: float) -> None:
        """Until the program has ended, by itself or because it had enough."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        watched = set(run.read)
        for descriptor in watched:
            poll.register(descriptor, select.POLLIN)
        while run.status is None:
            left = deadline - time.monotonic()
            ready = {descriptor for descriptor, _ in poll.poll(max(left, 0.0) * 1000 + 1)}
            done = {d for d in ready & watched if not run.take(d)}
            if run.flooded and run.end == "exit":
                done = set(watched)
                deadline = self._end(run, "output")
            for descriptor in done:
                poll.unregister(descriptor)
                watched.discard(descriptor)
            if self._channel.fileno() in ready:
                self._hear(run)
            elif time.monotonic() >= deadline:
                if run.end != "exit":
                    raise ServerLost("a killed program is not gone")
                deadline = self._end(run, "timeout")
        for descriptor in watched:  # what it wrote last
            while not run.flooded and run.take(descriptor):
                pass
        if run.flooded:
            run.end = "output"

    def _end(self, run: _Run, why: End) -> float:
        """Ask for the program's end; the time by which it must be gone."""
        run.end = why
        try:
            self._channel.send(json.dumps({"kill": run.number}).encode())
        except OSError as error:
            raise ServerLost(f"the fork server takes no orders ({error})") from error
        return time.monotonic() + END_S

    def _hear(self, run: _Run) -> None:
        report = self._report(time.monotonic() + END_S)
        if report.get("run") != run.number:
            raise ServerLost(f"found the report {report}, wanted one of run {run.number}")
        if "error" in report:
            raise SandboxUnavailable(report["error"])
        run.status = int(report["status"])
        if report["crowded"]:
            run.end = "threads"
        elif run.end == "exit" and run.status < 0:
            run.end = "killed"

    def _report(self, deadline: float) -> dict[str, Any]:
        self._channel.settimeout(max(deadline - time.monotonic(), 0.1))
        try:
            report = json.loads(self._channel.recv(1000))
        except (OSError, ValueError) as error:
            raise ServerLost(f"no word from the fork server ({error!r})") from error
        assert isinstance(report, dict), "the zygote sends objects"
        return report


class _Run:
    """A program under way: what came out of its pipes, and its end."""

    def __init__(self, number: int, most: int, pipes: list[int]) -> None:
        self.number = number
        self._most = most
        self.read = {descriptor: bytearray() for descriptor in pipes}
        self.end: End = "exit"
        self.status: int | None = None
        for descriptor in pipes:
            os.set_blocking(descriptor, False)

    @property
    def flooded(self) -> bool:
        """Whether it wrote more than it may."""
        return any(len(found) > self._most for found in self.read.values())

    def take(self, descriptor: int) -> bool:
        """Read some of what is there; whether there may be more."""
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        self.read[descriptor] += chunk
        return bool(chunk)


def _memory_file(content: bytes) -> int:
    """A file in memory that nobody can change any more, at its beginning."""
    descriptor = os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
