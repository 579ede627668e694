"""The same devices, in turn, for generation, scoring, training and saving.

A step walks through phases, in an order that `planner/residency.py` writes down as a table of legal
moves. Another table there says which buffers lie on the device in each phase. Between two phases
the scheduler moves exactly the difference (`mover.py`), asserts that everything is where it should
be (`ledger.py`), and measures. With a table that keeps everything resident nothing moves, and a
phase is a name and a stopwatch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from megatron_prime.errors import RunError
from megatron_prime.planner.residency import ENGINE, MOVES, NEEDED, START, WRITTEN, Buffers
from megatron_prime.protocols import Phase
from megatron_prime.runtime.deadline import Deadlines
from megatron_prime.runtime.ledger import GIB, Ledger, Limits
from megatron_prime.runtime.memory import Buffer
from megatron_prime.runtime.mover import BudgetExceeded, Moved, Mover
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Metrics

_CPU_IS_FULL = "can't allocate memory"  # of the RuntimeError that torch's CPU allocator raises


class IllegalMove(RuntimeError):
    """A phase that must not follow the one before."""


class DeviceFull(RunError, MemoryError):
    """Out of memory; the message says who holds what, and which knob would help."""


class PhaseScheduler:
    """Owns what lies on this rank's device; all ranks walk through the same phases."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        """With nothing on the device yet."""
        self.on_phase: Callable[[Phase], None] = lambda phase: None  # told before anything moves
        self.timeline = Timeline()
        self.deadlines: Deadlines | None = None
        self.limits = limits
        self._mover = Mover(limits.budget, device)
        self._ledger = Ledger(limits, self._mover.buffers)
        self._current: Phase | None = None
        self._last = START
        self._seconds: dict[str, float] = {}
        self._memory: Metrics = {}
        self._taken = Moved()

    def add(self, buffers: Iterable[Buffer]) -> None:
        """Take over buffers that lie on the device now."""
        for buffer in buffers:
            self._mover.add(buffer)

    @property
    def engine_leaves(self) -> bool:
        """Whether anything of the rollout engine ever has to leave."""
        return any(not row >= ENGINE for row in self.limits.table.values())

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Before the first phase: a model is built, or a server started. Raises DeviceFull."""
        with self._full_is_told(START):
            yield

    def make_room(self) -> None:
        """Before the first phase: send away what was added so far, unless everything always stays.

        So models can be built one after the other, and servers find the device empty.
        """
        if self.limits.starts_empty:
            self._arrange(START, NEEDED[Phase.GENERATE.value])

    @contextmanager
    def visit(self, owner: str) -> Iterator[None]:
        """Before the first phase: have what a checkpoint fills of `owner` on the device."""
        states = frozenset(f"{owner}.{kind}" for kind in ("weights", "masters", "moments"))
        with self.starting():
            if self.limits.starts_empty:
                self._arrange(START, states)
            yield
        self._mover.written(states)
        self.make_room()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Have the phase's buffers on the device, and count the wall time of the block.

        Raises IllegalMove, BudgetExceeded when its buffers have no room, DeviceFull when a block
        or a move runs out of memory, LedgerError when a buffer is not where it should be.
        """
        self._check_move(phase)
        self.on_phase(phase)
        self._current = phase
        try:
            with self._full_is_told(phase.value), self._watched(phase):
                with self._counted("switch"):
                    self._arrange(phase.value, self.limits.table[phase.value])
                with self._counted(phase.value), self.timeline.phase(phase):
                    yield
                    if torch.cuda.is_initialized():
                        torch.cuda.synchronize()
        finally:
            self._mover.written(WRITTEN.get(phase.value, frozenset()))
            self._current, self._last = None, phase.value

    @contextmanager
    def as_in(self, phase: Phase) -> Iterator[None]:
        """Inside another phase: the devices are for a while as `phase` wants them; collective.

        A server that is made anew while it should generate needs weights, as in a sync.
        """
        assert self._current is not None, "a phase is on"
        with self._full_is_told(phase.value):
            self._arrange(phase.value, self.limits.table[phase.value])
            yield
            self._arrange(self._current.value, self.limits.table[self._current.value])

    def take_seconds(self) -> Metrics:
        """`time/<phase>_s` of the phases since the last call, `time/switch_s` of all moves, and the
        idle times."""
        taken, self._seconds = self._seconds, {}
        seconds = {f"time/{name}_s": seconds for name, seconds in taken.items()}
        return seconds | self.timeline.take_seconds()

    def take_memory(self) -> Metrics:
        """In GiB: the most that this process has held so far, on the host and on a GPU; what all
        buffers held on the device in each phase, and what was moved, since the last call."""
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        figures, self._memory = self._memory, {}
        figures["memory/host_peak_gib"] = host / GIB
        if torch.cuda.is_initialized():
            figures["memory/device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            free, total = torch.cuda.mem_get_info()
            figures["memory/device_used_gib"] = (total - free) / GIB  # all processes, NCCL, graphs
        moved, before = self._mover.moved, self._taken
        figures["memory/moved_to_host_gib"] = (moved.to_host - before.to_host) / GIB
        figures["memory/moved_to_device_gib"] = (moved.to_device - before.to_device) / GIB
        self._taken = Moved(moved.to_host, moved.to_device)
        return figures

    def _check_move(self, phase: Phase) -> None:
        if self._current is not None:
            raise IllegalMove(
                f"phase {phase.value} began inside phase {self._current.value}; a phase must end "
                "before the next begins"
            )
        if phase.value not in MOVES[self._last]:
            raise IllegalMove(
                f"phase {phase.value} can't follow {self._last}: after that come only "
                f"{', '.join(sorted(MOVES[self._last]))}"
            )

    def _arrange(self, name: str, row: Buffers) -> None:
        """Move the difference, then assert that it is so."""
        self._switch(name, row)
        held = self._ledger.check(name, row)
        if name != START:
            self._memory[f"memory/{name}_device_gib"] = held / GIB
        budget, work = self.limits.budget, self.limits.work.get(name, 0)
        if budget is not None and held + work > budget:
            raise BudgetExceeded(
                f"it needs {work / GIB:.3f} GiB to work with, but its buffers hold "
                f"{held / GIB:.3f} GiB of {budget / GIB:.3f} GiB"
            )

    def _switch(self, name: str, row: Buffers) -> None:
        mover, moved = self._mover, self._mover.moved
        wanted = row & mover.buffers.keys()
        leaving, coming = mover.present - wanted, wanted - mover.present
        if not leaving and not coming:
            return
        to_host, to_device = moved.to_host, moved.to_device
        with self.timeline.switching(leaving, coming) as notes, self._ledger.of_allocator(name):
            mover.switch(row)
            notes["bytes_to_host"] = moved.to_host - to_host
            notes["bytes_to_device"] = moved.to_device - to_device

    def _watched(self, phase: Phase) -> AbstractContextManager[None]:
        return nullcontext() if self.deadlines is None else self.deadlines.phase(phase)

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

    @contextmanager
    def _full_is_told(self, name: str) -> Iterator[None]:
        """Out of memory, on a GPU or on the host: with the table of who holds what."""
        try:
            yield
        except BudgetExceeded as error:
            raise BudgetExceeded(
                f"{name} exceeds memory.device_gib less memory.reserve_gib: {error}\n"
                f"{self._ledger.table(name)}"
            ) from error
        except (RuntimeError, MemoryError) as error:
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not full and _CPU_IS_FULL not in str(error):
                raise
            line, table = str(error).partition("\n")[0], self._ledger.table(name)
            raise DeviceFull(f"out of memory in {name}: {line}\n{table}") from error
