"""Rank 0's switchboard: a thread with a line to every rank, which tells all of them when one ends.

The lines are TCP connections on which both sides say `beat` every few seconds, as lines of JSON.

    rank → hub   hello (rank, host, token)   beat (patience_s)   failed (error, stuck)        bye
    hub → rank   welcome                     beat (patience_s)   ended (rank, host, error, …)  bye

A rank has ended when it says so, when its line breaks off without a `bye` (the kernel closes it
within milliseconds of a kill -9 or a crash), or when nothing was heard of it for as long as it had
asked for (it is frozen, or its machine is gone). The first such ending is told to all. `welcome`
and the hub's `bye` go out when the last rank has said `hello` or `bye`: nobody starts before all
are there, and rank 0 does not leave while others still need it. `watchdog.py` is the other side.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

SERVED_S = 15.0  # how long ranks that don't leave are served after the end


class Ending(NamedTuple):
    """Which rank ended first, where, and why."""

    rank: int
    host: str
    error: str
    stuck: bool = False  # a phase of it lasted too long


def encode(kind: str, **fields: Any) -> bytes:
    """A message as a line of JSON."""
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


class Line:
    """One end of a connection: sends messages, and cuts what comes in into messages."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._tail = b""

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message; lost if the other side is gone or so stuck that its buffers are full."""
        with suppress(OSError):  # its end is noticed by reading
            self.connection.send(encode(kind, **fields))

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None once the other side is gone.

        Raises ValueError if what comes in are no messages.
        """
        try:
            chunk = self.connection.recv(65536)
        except (BlockingIOError, InterruptedError):  # nothing there after all
            return []
        except OSError:  # reset: the other side died with something unread
            chunk = b""
        if not chunk:
            return None
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        return [json.loads(line) for line in lines]


class _Member:
    """What the hub knows of whoever is at the other end of a line."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.rank, self.host = -1, ""  # until it has said hello
        self.heard, self.patience_s = time.monotonic(), float("inf")


class Hub:
    """Listens on `address`; `port` and `token` are what a rank needs to join."""

    def __init__(
        self,
        address: str,
        world_size: int,
        beat_s: float,
        timeout_s: float,
        several_nodes: bool = False,
    ) -> None:
        """Serve `world_size` ranks, which must have come after `timeout_s`, from a thread."""
        self.token = secrets.token_hex(8)
        self._patience_s = float("inf")
        self._listener = listen_on(address, several_nodes)
        self.port = int(self._listener.getsockname()[1])
        self._world_size, self._beat_s, self._timeout_s = world_size, beat_s, timeout_s
        self._started = time.monotonic()
        self._welcomed = False
        self._ending: Ending | None = None
        self._leave_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._members: list[_Member] = []
        self._done: set[int] = set()  # ranks that have said bye
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)
        os.register_at_fork(after_in_child=self.close)  # a child must not keep a line open
        self._thread.start()

    def be_patient(self, seconds: float) -> None:
        """Let the ranks allow this process a silence of `seconds` from now on."""
        self._patience_s = seconds
        self._tell("beat", patience_s=seconds)

    def wait(self, seconds: float) -> None:
        """Return when all other ranks are gone after the end, or after `seconds`."""
        self._thread.join(seconds)

    def close(self) -> None:
        """Close all lines of this process; the ranks stay connected to the process it came from."""
        for member in self._members:
            member.line.connection.close()
        self._listener.close()

    def _serve(self) -> None:
        next_beat = 0.0
        while time.monotonic() < self._leave_at and not self._all_gone():
            for key, _ in self._selector.select(self._beat_s / 4):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            # Only now: if this process itself was held up, the others' beats were waiting.
            self._judge()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._beat_s
                self._tell("beat", patience_s=self._patience_s)
        self.close()

    def _all_gone(self) -> bool:
        return self._leave_at < float("inf") and not any(m.rank > 0 for m in self._members)

    def _tell(self, kind: str, **fields: Any) -> None:
        for member in list(self._members):  # also called by the main thread
            if member.rank >= 0:
                member.line.send(kind, **fields)

    def _accept(self) -> None:
        with suppress(OSError):  # it gave up before it was let in
            line = Line(self._listener.accept()[0])
            self._members.append(_Member(line))
            self._selector.register(line.connection, selectors.EVENT_READ, self._members[-1])

    def _read(self, member: _Member) -> None:
        try:
            messages = member.line.receive()
            for message in messages or []:
                self._take(member, message)
        except (ValueError, KeyError, TypeError):  # no rank of ours: a port scanner, say
            messages = None
        if messages is None:
            self._drop(member)
            if member.rank >= 0 and member.rank not in self._done:
                self._end(member, "it was killed (kill -9, out of memory), or it crashed")

    def _take(self, member: _Member, message: dict[str, Any]) -> None:
        kind = message["kind"]
        member.heard = time.monotonic()
        if kind == "hello" and message["token"] == self.token:
            member.rank, member.host = int(message["rank"]), str(message["host"])
            if self._ending is not None:
                member.line.send("ended", **self._ending._asdict())
            if len({m.rank for m in self._members if m.rank >= 0}) == self._world_size:
                self._welcomed = True
                self._tell("welcome")
        elif member.rank < 0:
            raise ValueError("no hello")
        elif kind == "beat":
            member.patience_s = float(message["patience_s"])
        elif kind == "failed":
            self._end(member, str(message["error"]), bool(message.get("stuck")))
        elif kind == "bye":
            self._done.add(member.rank)
            if len(self._done) == self._world_size:
                self._tell("bye")
                self._leave_at = time.monotonic() + SERVED_S

    def _judge(self) -> None:
        """Look for ranks that are silent for too long, or have not come at all."""
        now = time.monotonic()
        for member in self._members:
            done = member.rank < 0 or member.rank in self._done
            if not done and now - member.heard > member.patience_s:
                self._end(member, f"no sign of life of it for {now - member.heard:.0f} s")
        if not self._welcomed and now - self._started > self._timeout_s:
            here = {member.rank for member in self._members}
            absent = ", ".join(str(rank) for rank in range(self._world_size) if rank not in here)
            self._end(None, f"after run.timeout_s = {self._timeout_s:g} s it waits for {absent}")

    def _end(self, member: _Member | None, error: str, stuck: bool = False) -> None:
        """Tell all ranks, once."""
        if self._ending is None and self._leave_at == float("inf"):
            rank, host = (member.rank, member.host) if member else (0, socket.gethostname())
            self._ending = Ending(rank, host, error, stuck)
            self._tell("ended", **self._ending._asdict())
            self._leave_at = time.monotonic() + SERVED_S

    def _drop(self, member: _Member) -> None:
        self._selector.unregister(member.line.connection)
        member.line.connection.close()
        self._members.remove(member)


def listen_on(address: str, several_nodes: bool) -> socket.socket:
    """At a free port of `address`, or of all if that is not this machine's: a service's name.

    Of all, too, with several nodes, for a name that means loopback, as in Debian's /etc/hosts: on
    the other nodes the same name means this one.
    """
    family, *_, found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    is_loopback = ipaddress.ip_address(str(found[0]).partition("%")[0]).is_loopback
    is_name = address not in (found[0], "localhost")
    here = "" if several_nodes and is_loopback and is_name else str(found[0])
    try:
        listener = socket.create_server((here, 0), family=family, backlog=4096)
    except OSError:  # not ours
        listener = socket.create_server(("", 0), family=family, backlog=4096)
    listener.setblocking(False)
    return listener
