"""Programs that are asked something; none of them outlives the process that asks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import partial

from megatron_prime.runtime.parent import fork_dies_with


def output_of(command: Sequence[str]) -> str:
    """What it prints; raises RuntimeError with its last line when it fails, OSError without it.

    May hang; call it in a thread that nobody waits for. The kernel kills the program when that
    thread ends, and a process ends all its threads.
    """
    found = subprocess.run(
        list(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=partial(fork_dies_with, os.getpid()),
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{command[0]} ended with status {found.returncode}: {last}")
    return found.stdout
