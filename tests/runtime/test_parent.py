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
