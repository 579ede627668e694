"""A real Slurm of several emulated nodes on this machine, for as long as somebody wants it.

    python tests/slurm/cluster.py FOLDER [NODES [CORES]]

starts munged, slurmctld and a slurmd per node on loopback: no systemd, no cgroups, no accounting,
nothing to configure; `export SLURM_CONF=FOLDER/slurm.conf` is all that sbatch needs. It prints
`ready` when all nodes are idle and then reads commands: `start n2` starts a slurmd that has ended.
At the end of its input, so also when whoever started it is killed, it ends all it has started.

slurmd forks its job steps off, so that they survive it. They and the tasks of jobs come back to
this process all the same, because it is their subreaper (prctl(2)): nobody gets away, nobody else
is hit. The daemons themselves die also with a killed cluster.py.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <sys/prctl.h>
READY_WITHIN_S = 60
STOP_WITHIN_S = 2  # then SIGKILL; job steps do not listen to SIGTERM at all
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
SBIN = ":/usr/sbin:/sbin"  # not on everybody's PATH
GPUS = 8
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired: 120 s if nothing is said here
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=30
KillWait=30
JobRequeue=1
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the nodes have more cores than this machine
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:{gpus}\n"
)


def missing() -> list[str]:
    """What this needs and the machine has not, or does not allow."""
    path = os.environ.get("PATH", "") + SBIN
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_device(Path(folder) / "gpu")
        except PermissionError:  # not root, or a container that may not
            lacking.append("right to make device files, which emulated GPUs are")
    return lacking


def make_device(path: Path) -> None:
    """One that behaves like /dev/null."""
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


def node_names(nodes: int) -> list[str]:
    return [f"n{number}" for number in range(1, nodes + 1)]


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that nobody listens on now, all different."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def write_files(folder: Path, nodes: int, cores: int) -> None:
    """Key and configuration."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
    port, *ports = free_ports(1 + nodes)
    text = CONF.format(folder=folder, host=host, user=user, port=port)
    for name, own in zip(node_names(nodes), ports, strict=True):
        (folder / "spool" / name).mkdir()
        text += NODE.format(name=name, host=host, port=own, cores=cores, gpus=GPUS)
    (folder / "slurm.conf").write_text(text)
    for number in range(GPUS):  # Slurm wants to see a device of each
        make_device(folder / f"gpu{number}")
    gpus = f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]"
    (folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")


class Daemons:
    """What this process has started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libc = ctypes.CDLL(None)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._environ["PATH"] += SBIN

    def start(self, program: str, *arguments: str) -> None:
        """In the foreground; it dies with us also if we are killed."""
        log = (self._folder / "daemons.log").open("a")
        subprocess.Popen(
            [program, *arguments],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def start_munge(self) -> None:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        files = [f"--{option}={self._folder}/munge.{name}" for option, name in names.items()]
        self.start("munged", "--foreground", "--force", *files, f"--seed-file={self._folder}/seed")
        wait_until((self._folder / "munge.socket").exists, "munged's socket", self._folder)

    def start_node(self, name: str) -> None:
        self.start("slurmd", "-D", "-N", name)

    def idle(self) -> int:
        command = ["sinfo", "--noheader", "--Node", "--format=%t"]
        found = subprocess.run(command, env=self._environ, capture_output=True, text=True)
        return found.stdout.split().count("idle")

    def stop(self) -> None:
        """Everybody below us; orphans come back to us, so look until nobody is left."""
        me, patience = psutil.Process(), time.monotonic() + STOP_WITHIN_S
        while children := me.children(recursive=True):
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill() if time.monotonic() > patience else child.terminate()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.1)


def wait_until(done: Callable[[], bool], what: str, folder: Path) -> None:
    patience = time.monotonic() + READY_WITHIN_S
    while not done():
        if time.monotonic() > patience:
            logs = [path.read_text() for path in folder.glob("*.log")]
            sys.exit("\n".join([f"no {what} within {READY_WITHIN_S} s", *logs]))
        time.sleep(0.05)


def main(folder: Path, nodes: int = 2, cores: int = 8) -> None:
    write_files(folder, nodes, cores)
    daemons = Daemons(folder)
    try:
        daemons.start_munge()
        daemons.start("slurmctld", "-D", "-c")
        for name in node_names(nodes):
            daemons.start_node(name)
        wait_until(lambda: daemons.idle() == nodes, f"{nodes} idle nodes", folder)
        print("ready", flush=True)
        for line in sys.stdin:
            word, name = line.split()
            assert word == "start"
            daemons.start_node(name)
            print("started", flush=True)
    finally:
        daemons.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
