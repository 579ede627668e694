"""A killed launcher takes its ranks with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

CHILD = "from megatron_prime.runtime.parent import die_with; import os, time; die_with({parent}); "
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {code!r}.format(parent=os.getpid())],
                         stdout=subprocess.PIPE)
child.stdout.readline()  # it has asked to die with us
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_a_child_dies_with_a_killed_parent() -> None:
    code = LAUNCHER.format(code=CHILD + "print('ready', flush=True); time.sleep(60)")
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = psutil.Process(int(launcher.stdout.readline()))
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    try:
        child.wait(timeout=10)
    except psutil.TimeoutExpired:
        child.kill()
        raise


def test_a_child_that_comes_too_late_ends_at_once() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format(parent=1 << 30)], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert f"parent {1 << 30} is gone" in ended.stderr


FORKS = """
import multiprocessing, os, time
from megatron_prime.runtime.parent import take_forks_along

def sleep(name):
    if name == "child":  # a fork of a fork
        fork.Process(target=sleep, args=("grandchild",)).start()
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: both write to the same pipe
    time.sleep(60)

take_forks_along()
fork = multiprocessing.get_context("fork")
fork.Process(target=sleep, args=("child",)).start()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_forks_of_forks_die_with_a_killed_process() -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    forks = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    assert all(fork.is_running() for fork in forks)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(forks, timeout=10)
    for fork in alive:
        fork.kill()
    assert not alive


ORPHAN = """
import os
from megatron_prime.runtime.parent import fork_dies_with

os.register_at_fork(after_in_child=lambda: fork_dies_with(1 << 30))
child = os.fork()
if child == 0:
    print("the child lives on", flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_whose_parent_is_another_ends_in_its_hook() -> None:
    ended = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True)
    assert ended.stdout == "1\n"
    assert ended.stderr == f"parent {1 << 30} is gone\n"
