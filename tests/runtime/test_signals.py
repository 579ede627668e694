"""SIGTERM and SIGUSR1: remembered while something can be saved, else the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os, signal, subprocess, sys, threading, time
from megatron_prime.runtime.signals import StopSignals, block_stop_signals

def leave(number):
    os.write(1, f"left by {number.name}".encode())
    os._exit(9)

signals = StopSignals(leave)
"""


def run(code: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_where_nothing_is_saved_it_ends_at_once(name: str) -> None:
    code = f"os.kill(os.getpid(), signal.{name}); time.sleep(50)"
    assert run(code) == (9, f"left by {name}")


def test_it_ends_at_once_though_the_main_thread_is_stuck_in_native_code() -> None:
    """A lock's `acquire` comes back to Python for a signal; one of C does not."""
    code = """
import ctypes
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
libc, deadline = ctypes.CDLL(None), time.monotonic() + 40
class Mutex(ctypes.Structure):
    _fields_ = [("data", ctypes.c_long * 8)]
mutex = Mutex()
libc.pthread_mutex_lock(ctypes.byref(mutex))
libc.pthread_mutex_lock(ctypes.byref(mutex))
"""
    assert run(code) == (9, "left by SIGTERM")


def test_in_the_loop_it_waits_until_it_is_asked() -> None:
    code = """
with signals.remembered(agree=lambda number: number):
    print(signals.asked())
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    print(signals.asked())
    sys.stdout.flush()
    os._exit(0)
"""
    assert run(code) == (0, "None\nSIGUSR1\n")


def test_another_rank_s_signal_counts() -> None:
    code = """
with signals.remembered(agree=lambda number: max(number, signal.SIGTERM)):
    print(signals.asked())
"""
    assert run(code) == (0, "SIGTERM\n")


def test_one_that_comes_after_the_last_question_is_not_lost() -> None:
    code = """
with signals.remembered(agree=int):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
"""
    assert run(code) == (9, "left by SIGTERM")


def test_other_signals_are_python_s() -> None:
    code = """
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(50)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(code) == (0, "interrupted\n")


def test_processes_of_a_blocking_thread_are_spared() -> None:
    code = """
def start():
    block_stop_signals()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"])
    child.send_signal(signal.SIGUSR1)
    child.send_signal(signal.SIGTERM)
    print(child.wait())
thread = threading.Thread(target=start)
thread.start()
thread.join()
"""
    assert run(code) == (0, "0\n")


def test_a_fork_s_signal_is_not_its_parent_s() -> None:
    code = """
child = os.fork()
if child == 0:
    time.sleep(2)
    os._exit(0)
time.sleep(0.5)
os.kill(child, signal.SIGTERM)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == (0, "0\n")
