"""Taking turns: contestants in processes of their own, of which one works while the others sleep.

A contestant prints a line of JSON when it is ready, waits for a line on stdin, does one piece of
work, prints the next line of JSON. So repetitions of all contestants are interleaved, and whatever
else the machine does meets them alike. The clock is the driver's: it runs from the word to go to
the report.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_prime.runtime.parent import die_with

REPORTS = sys.stdout


def enter() -> None:
    """Contestant: keep stdout for reports alone, what others print goes to stderr; never outlive
    the driver or the launcher."""
    die_with(os.getppid())
    sys.stdout = sys.stderr


def report(details: Mapping[str, float]) -> None:
    """Contestant: say that a piece of work is done, and wait for the next turn.

    Of several ranks the first one speaks, when all are done; the others wait for it.
    """
    import torch.distributed as dist  # not in the driver: it needs no torch

    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.barrier()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(details), file=REPORTS, flush=True)
        sys.stdin.readline()
    if several:
        dist.barrier()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Contestant:
    """A process that takes turns; a context manager that ends it."""

    def __init__(
        self, name: str, script: Path, arguments: Sequence[object], ranks: int, threads: int
    ) -> None:
        """Start `script`, under torchrun if it has several ranks; it gets ready by itself."""
        self.name = name
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), script, *arguments]
        self.seconds: list[float] = []
        self.details: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"},
        )

    def wait_until_ready(self) -> None:
        """Read the first report."""
        self._read()

    def turn(self, counts: bool) -> None:
        """Let it do one piece of work; a warm-up doesn't count."""
        assert self._process.stdin is not None
        started = time.perf_counter()
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        details = self._read()
        if counts:
            self.seconds.append(time.perf_counter() - started)
            self.details.append(details)

    @property
    def median(self) -> float:
        """Median seconds of the turns that counted."""
        return median(self.seconds)

    def detail(self, name: str) -> float:
        """Median of one figure of its reports."""
        return median(details[name] for details in self.details)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}; see its stderr")
        return dict(json.loads(line))

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def take_turns(contestants: Sequence[Contestant], warm_up: int, turns: int) -> None:
    """Round after round, each contestant once."""
    for contestant in contestants:
        contestant.wait_until_ready()
    for round_ in range(warm_up + turns):
        for contestant in contestants:
            contestant.turn(counts=round_ >= warm_up)
