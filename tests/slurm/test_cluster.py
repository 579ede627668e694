"""The cluster of the tests: none of its processes outlives them, and nobody else can reach it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
from slurm_client import Slurm

KILLED = """
import os, signal, sys
sys.path.append({here!r})
from pathlib import Path
from slurm_client import start_slurm
slurm = start_slurm(Path({folder!r}), nodes=2, cores=4)
job = slurm.submit("--nodes=2", "--wrap=srun sleep 1000")
job.wait_until(lambda: job.state == "RUNNING", "running")
print("running", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def users_of(word: str) -> list[psutil.Process]:
    """Processes with this word in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:  # it ended while we looked, or is the kernel's
            continue
        if any(word in one for one in words):
            found.append(process)
    return found


def test_nobody_outlives_killed_tests(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    program = KILLED.format(here=str(Path(__file__).parent), folder=str(folder))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "running\n", run.stderr
    assert run.returncode == -9
    patience = time.monotonic() + 60
    while left := users_of(str(folder)):
        assert time.monotonic() < patience, [process.cmdline() for process in left]
        time.sleep(0.2)


def test_all_listen_on_loopback_alone(slurm: Slurm) -> None:
    job = slurm.submit("--nodes=2", "--ntasks=2", "--wrap=srun sleep 1000")
    job.wait_until(lambda: job.state == "RUNNING", "running")
    time.sleep(1)
    keeper = psutil.Process(slurm.keeper.pid)
    listeners = [
        connection.laddr.ip
        for process in keeper.children(recursive=True)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    job.cancel()
    assert len(listeners) >= 17, "slurmctld and 16 slurmd"
    assert set(listeners) == {"127.0.0.1"}
