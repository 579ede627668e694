"""One SGLang server as a child process: started, waited for, killed with all its children.

The server's folder has its log, and while it lives a state file that says which process it is. A
process of an older run that still lives by that file is never adopted: nobody knows its weights,
and its devices are taken. Ports are kept by a bound socket that does not listen; the kernel gives
such a port to nobody who asks for any, and lets SGLang, which asks for it by number with
SO_REUSEADDR, listen on it.

`start` returns at once, so that several servers can start together; `ready` blocks, for nothing
can be done before the servers are up. The kernel kills a server when the *thread* that started it
ends: call `start` in one that lasts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path

import psutil

from megatron_prime.errors import RunError
from megatron_prime.rollout.sglang_arguments import (
    PACKAGE,
    ServerSpec,
    import_folder,
    server_arguments,
    server_environment,
)

LEFT_OVER_GRACE_S = 10.0  # a server of a run that was killed just now is dying
GONE_WITHIN_S = 30.0  # after kill -9; the kernel may take long to free a GPU's memory
POLL_S = 0.2
TAIL_LINES = 30
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment


class ServerNotStarted(RunError):
    """A server ended before it was up, or was not up in time."""


class LeftOverServer(RunError):
    """A server of an older run lives on."""


@dataclass(frozen=True)
class State:
    """Which process a server is; a pid alone may be somebody else's by now."""

    pid: int
    started: float  # seconds since the epoch, as psutil has it
    port: int
    host: str  # it ran on; run folders are shared between nodes

    @classmethod
    def read(cls, file: Path) -> State | None:
        """What the file says; None if there is none, or one that was cut while it was written."""
        try:
            return cls(**json.loads(file.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, file: Path) -> None:
        """Replace the file."""
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(file)

    def process(self) -> psutil.Process | None:
        """The process, if it lives on this host."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return process if same and not _gone(process) else None
        except psutil.NoSuchProcess:
            return None


class SglangServer:
    """A server by its spec; can be started again after it died or was killed."""

    def __init__(self, spec: ServerSpec) -> None:
        """Nothing is started yet."""
        self.spec = spec
        self.log_file = spec.folder / "server.log"
        self.state_file = spec.folder / "server.json"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._ports: list[socket.socket] = []

    @property
    def url(self) -> str:
        """Where it is spoken to."""
        return f"http://{_bracketed(self.spec.host)}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the main process; None before the first start."""
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        """Whether the main process runs; that does not say that it answers."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return; `ready` waits until it answers.

        Raises LeftOverServer if one of an older run lives on in this folder, OSError if the
        interpreter can't be run.
        """
        assert not self.alive(), "the server runs already; kill it first"
        self.kill()
        self._refuse_left_over()
        _link_package(import_folder(self.spec))
        self._ports = [_reserved_port(self.spec.host), _reserved_port(self.spec.host)]
        self.port, nccl_port = (held.getsockname()[1] for held in self._ports)
        arguments = server_arguments(self.spec, self.port, nccl_port)
        module = "megatron_prime.rollout.sglang_main"
        with os.fdopen(_private_log(self.log_file), "ab") as log:
            self._process = subprocess.Popen(
                # -P: not from the present folder, which user's relative paths start from
                [str(self.spec.python), "-P", "-m", module, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self.spec, os.environ, sorted(_cores())),
                start_new_session=True,  # Ctrl-C is for the trainer, which may want to save first
            )
        self._started_at = time.monotonic()
        with suppress(psutil.NoSuchProcess):  # it has ended already; `ready` will say why
            started = psutil.Process(self._process.pid).create_time()
            State(self._process.pid, started, self.port, socket.gethostname()).write(
                self.state_file
            )
        assert self._process.stdin is not None, "it was started with a pipe"
        with suppress(BrokenPipeError), self._process.stdin as options:
            options.write(json.dumps(arguments).encode())

    def ready(self, timeout_s: float | None = None) -> None:
        """Block until the server answers; `spec.start_timeout_s` counts from its start.

        Raises ServerNotStarted, with the log's last lines, if it ends first or takes too long.
        """
        allowed = self.spec.start_timeout_s if timeout_s is None else timeout_s
        while not self._healthy():
            if not self.alive():
                code = self._process.returncode if self._process else None
                raise ServerNotStarted(
                    f"the SGLang server ended with status {code} before it was up; its log "
                    f"{self.log_file} ends with\n{self.log_tail(TAIL_LINES)}"
                )
            if time.monotonic() - self._started_at > allowed:
                self.kill()
                raise ServerNotStarted(
                    f"the SGLang server was not up after {allowed:g} s (rollout.start_timeout_s); "
                    f"its log {self.log_file} ends with\n{self.log_tail(TAIL_LINES)}"
                )
            time.sleep(POLL_S)

    def kill(self) -> None:
        """Kill the server and all its children, and wait until they are gone. Once is enough."""
        process, self._process = self._process, None
        if process is not None:
            # Children first, which are then reaped; those of one that is dead are dying already.
            ours = process.poll() is None or not psutil.pid_exists(process.pid)
            members = [one for one in _session(process.pid) if one.pid != process.pid]
            _kill(members if ours else [])
            process.kill()
            process.wait()
            self.state_file.unlink(missing_ok=True)
        for held in self._ports:
            held.close()
        self._ports = []

    def log_tail(self, lines: int) -> str:
        """The last lines of the log, without the API key, which SGLang writes into it."""
        try:
            with self.log_file.open(errors="replace") as log:
                text = "".join(deque(log, maxlen=lines))
        except FileNotFoundError:
            return ""
        return text.replace(self.spec.api_key, "***") if self.spec.api_key else text

    def _healthy(self) -> bool:
        try:
            with _NO_PROXY.open(f"{self.url}/health", timeout=5.0) as answer:
                return bool(answer.status == 200)
        except (OSError, HTTPException):  # not listening yet, or 503: still starting
            return False

    def _refuse_left_over(self) -> None:
        state = State.read(self.state_file)
        left_over = state.process() if state else None
        deadline = time.monotonic() + LEFT_OVER_GRACE_S
        while left_over is not None and not _gone(left_over):
            if time.monotonic() > deadline:
                raise LeftOverServer(
                    f"found an SGLang server of an older run, process {left_over.pid}, by "
                    f"{self.state_file}; end it with `kill -9 {left_over.pid}`, or use another "
                    "run folder"
                )
            time.sleep(POLL_S)
        self.state_file.unlink(missing_ok=True)


def _session(leader: int) -> list[psutil.Process]:
    """All processes of the session that `leader` has begun; its children stay in it without it."""
    members = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.NoSuchProcess):  # it has just ended
            if os.getsid(pid) == leader:
                members.append(psutil.Process(pid))
    return members


def _kill(processes: list[psutil.Process]) -> None:
    """Kill them and wait until they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < deadline and not all(map(_gone, processes)):
        time.sleep(0.01)


def _gone(process: psutil.Process) -> bool:
    """Whether it has ended; it may still wait, a zombie, for a parent that doesn't care."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _link_package(folder: Path) -> None:
    """Make the folder, and the one it is in, with a link to our package."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / PACKAGE.name
    link.unlink(missing_ok=True)
    link.symlink_to(PACKAGE)


def _private_log(file: Path) -> int:
    """A descriptor to append with; SGLang logs its options, the API key among them."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reserved_port(host: str) -> socket.socket:
    """A socket that holds a free port, on all addresses, for a program with SO_REUSEADDR."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held
