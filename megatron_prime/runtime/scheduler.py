"""Phases for machines where everything fits: nothing moves, time is measured.

A step walks through phases one after the other (generate, score, update …). The scheduler is the
place that knows which phase is on; here policy, PRM, reference and rollout model all stay where
they are, so a phase is only a name and a stopwatch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_prime.protocols import Phase
from megatron_prime.types import Metrics


class ResidentScheduler:
    """Measures each phase; all buffers are resident all the time."""

    def __init__(self, on_phase: Callable[[Phase], None]) -> None:
        """`on_phase` is told which phase begins, before it does."""
        self._on_phase = on_phase
        self._current: Phase | None = None
        self._seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the wall time of the block for `phase`, work queued on the GPU included.

        Raises RuntimeError if another phase is on: the devices serve one at a time.
        """
        if self._current is not None:
            raise RuntimeError(
                f"phase {phase.value} began inside phase {self._current.value}; a phase must end "
                "before the next begins"
            )
        self._on_phase(phase)
        self._current, started = phase, time.perf_counter()
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        finally:
            self._current = None
            elapsed = time.perf_counter() - started
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def take_seconds(self) -> Metrics:
        """`time/<phase>_s` of every phase that was on since the last call; starts again at 0."""
        taken, self._seconds = self._seconds, {}
        return {f"time/{phase.value}_s": seconds for phase, seconds in taken.items()}

    def peak_memory(self) -> Metrics:
        """Most that this process has held so far, in GiB: of host memory and, on a GPU, of its."""
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        figures = {"memory/host_peak_gib": host / 2**30}
        if torch.cuda.is_initialized():
            figures["memory/device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return figures
