"""A run in plain processes, as srun starts them: no launcher cares for them, a test can hit one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from job import ROOT, Job
from launch import free_port

GONE_WITHIN_S = 60


class Ranks:
    """The ranks of one run; a context manager, after which none of them is left."""

    def __init__(
        self, job: Job, count: int, name: str, *knobs: str, command: str = "train"
    ) -> None:
        self.folder = job.run(name)
        self._log = self.folder.with_suffix(".log")
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environ["WORLD_SIZE"] = str(count)
        with self._log.open("w") as log:
            self.processes = [
                psutil.Popen(
                    [sys.executable, "-m", "megatron_prime", command, *job.arguments(name, *knobs)],
                    cwd=ROOT,
                    env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(count)
            ]

    @property
    def said(self) -> str:
        """What all ranks have printed so far."""
        return self._log.read_text()

    def wait_for_step(self, step: int) -> None:
        """Return as soon as the step's line is in metrics.jsonl."""
        wait_for_step(self.folder, step, self._assert_running)

    def wait_for(self, path: Path) -> None:
        """Return as soon as there is such a file or folder."""
        while not path.exists():
            self._assert_running()
            time.sleep(0.002)

    def codes(self, within_s: float = GONE_WITHIN_S, but: Sequence[int] = ()) -> list[int]:
        """The exit codes of all ranks but some, which must come in time."""
        waited = [process for rank, process in enumerate(self.processes) if rank not in but]
        left = outliving(waited, within_s)
        assert left == [], self.said
        return [process.wait() for process in waited]

    def _assert_running(self) -> None:
        assert all(process.poll() is None for process in self.processes), self.said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):  # it ended by itself
                process.kill()
            process.wait()


def wait_for_step(folder: Path, step: int, check: Callable[[], object]) -> None:
    """Return as soon as the step's line is in metrics.jsonl; `check` is called meanwhile."""
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        check()
        time.sleep(0.01)


def outliving(family: Iterable[psutil.Process], within_s: float) -> list[str]:
    """The commands of those who still run after `within_s`; they are killed then."""
    family = list(family)
    deadline = time.monotonic() + within_s
    while (left := [p for p in family if runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    commands = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    return commands


def runs(process: psutil.Process) -> bool:
    """False also for one that merely waits for its parent to collect it."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
