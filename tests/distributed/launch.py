"""Start several ranks of a script on this machine, as `torchrun` does for a user."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def run_ranks(
    script_or_module: str | Path,
    nproc: int,
    args: Sequence[object] = (),
    timeout_s: float = 240,
    launcher: Sequence[str] = (),
) -> str:
    """Run a script (a path) or a module (a dotted name) on `nproc` gloo ranks; returns its output.

    Standard output and error of all ranks come together. AssertionError with that output when a
    rank fails or `timeout_s` passes; no process is left behind in either case.
    """
    target = str(script_or_module)
    what = [target] if target.endswith(".py") else ["-m", target]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command += [*launcher, *what, *map(str, args)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    torchrun = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = torchrun.communicate(timeout=timeout_s)
    except BaseException as error:  # a timeout, or Ctrl-C: no rank may outlive the test
        output = _stop(torchrun)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise AssertionError(f"no end after {timeout_s} s:\n{output}") from None
    assert torchrun.returncode == 0, f"exit status {torchrun.returncode}:\n{output}"
    return output


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _stop(launcher: subprocess.Popen[str]) -> str:
    """Kill the launcher and its ranks, which it puts into sessions of their own."""
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # it ended by itself
            rank.kill()
    try:
        return launcher.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        return "(no output: a process that outlived the ranks keeps their pipe open)"
