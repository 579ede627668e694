import signal
import subprocess
import sys
import time

import pytest

from megatron_prime.verify.math_limit import cpu_limit


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_takes_too_long_ends_by_an_exception_that_libraries_do_not_catch():
    started = time.process_time()

    @cpu_limit(0.2, 30.0)
    def check():
        try:
            burn(20)
        except Exception:  # as a library that carries on
            burn(20)

    with pytest.raises(TimeoutError, match=r"0\.2 s of CPU time"):
        check()
    assert time.process_time() - started < 5


def test_what_is_in_time_is_left_alone_and_nothing_fires_later():
    handler = signal.getsignal(signal.SIGVTALRM)
    with cpu_limit(0.3, 0.6):
        burn(0.02)
    burn(0.8)
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_waiting_costs_no_cpu_time():
    with cpu_limit(0.2, 0.4):
        time.sleep(0.7)


def test_one_endless_step_of_c_is_the_end_of_the_process():
    code = """
import itertools
from megatron_prime.verify.math_limit import cpu_limit
with cpu_limit(0.2, 0.5):
    sum(itertools.repeat(1))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert done.returncode == -signal.SIGPROF
