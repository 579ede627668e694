"""What a rank does when: events to look at (`trace.py`), and idle seconds by cause.

One of these is shared by all who know something of it: the scheduler tells phases and memory moves,
the rollout engine how many of its decode slots work, the verifier when its checks are done, the
ranks when all have met. A round of generation, on one rank, is cut up without gap or overlap:

    generating ─────────────────────── last rollout ────── last check ─────────── all have met
      decode slots that work: busy         verifying            straggling
      those that don't: long tail

docs/metrics.md defines the causes. What others have to wait for is not told from within a round:
each rank's seconds travel with the rollouts that are gathered at its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from megatron_prime.protocols import Phase
from megatron_prime.runtime.trace import Trace
from megatron_prime.types import Metrics

LEVELS = 16  # so many values of "slots at work" are drawn of a long tail


class Seconds(NamedTuple):
    """How a rank spent a round; the parts add up to it."""

    busy: float
    long_tail: float
    verifying: float
    straggling: float


class Round:
    """The accounts of one round; whoever calls says what time it is."""

    def __init__(self) -> None:
        self.began: float | None = None  # the first decode slot's start
        self.rollouts_done = self.checks_began = self.checks_done = 0.0
        self._busy = self._long_tail = self._verifying = self._straggling = 0.0
        self._slots, self._share = 1, 0.0  # of the slots, how many work
        self._since: float | None = None  # until when the slots are accounted for; None: no more

    def generating(self, now: float, slots: int) -> None:
        """`slots` responses are sampled at once from now on."""
        if self.began is None:
            self.began = now
        else:  # another pass, after a wait for the others and their servers
            self._wait_until(now)
        self._since, self._slots, self._share = now, max(slots, 1), min(slots, 1)

    @property
    def share(self) -> float:
        """Of the decode slots, how many work."""
        return 0.0 if self._since is None else self._share

    def at_work(self, now: float, slots: int) -> None:
        """So many of them from now on."""
        if self._since is not None:
            self._busy += (now - self._since) * self._share
            self._long_tail += (now - self._since) * (1 - self._share)
            self._since, self._share = now, slots / self._slots

    def generated(self, now: float) -> None:
        """The last rollout is done."""
        if self._since is not None:
            self.at_work(now, 0)
            self._since, self.rollouts_done = None, now

    def met(self, now: float) -> Seconds:
        """All ranks have come to the end of the round."""
        self.generated(now)
        self._wait_until(now)
        return Seconds(self._busy, self._long_tail, self._verifying, self._straggling)

    def _wait_until(self, now: float) -> None:
        free = max(self.rollouts_done, self.checks_done)
        self._verifying += free - self.rollouts_done
        self._straggling += now - free


class Timeline:
    """Of this rank; may be told things by any thread."""

    def __init__(
        self, trace: Trace | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`trace`: where events go; without one only seconds are counted."""
        self.trace = trace
        self._clock, self._lock = clock, threading.RLock()
        self._phase: Phase | None = None
        self._round: Round | None = None
        self._rounds = 0  # of this phase
        self._level = 0.0  # share of the slots at work that was drawn last
        self._generation: list[Seconds] = []  # rounds since the last `take_seconds`

    # ------------------------------------------------------------------ the scheduler

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """The block is a phase."""
        self._phase, self._round, self._rounds = phase, None, 0
        started = self._clock()
        try:
            yield
        finally:
            self._phase = None
            self._draw("phases", phase.value, started, self._clock(), flush=True)

    @contextmanager
    def switching(self, leaving: Iterable[str], coming: Iterable[str]) -> Iterator[dict[str, Any]]:
        """In the block all wait while buffers leave the device and come to it.

        What the block adds to the notes that it gets stands beside the event.
        """
        notes: dict[str, Any] = {"leave": sorted(leaving), "come": sorted(coming)}
        started = self._clock()
        yield notes
        ended = self._clock()
        self._draw("moves", "move", started, ended, **notes)
        self._draw("idle", "switching", started, ended)

    def take_seconds(self) -> Metrics:
        """`time/idle_…_s` since the last call, and what generation was busy: means over ranks.

        Nothing if there was no generation. The scheduler itself counts what its moves take.
        """
        with self._lock:
            rounds, self._generation = self._generation, []
        if not rounds:
            return {}
        busy, long_tail, verifying, straggling = (
            sum(column) for column in zip(Seconds(0, 0, 0, 0), *rounds, strict=True)
        )
        return {
            "time/busy_generating_s": busy,
            "time/idle_long_tail_s": long_tail,
            "time/idle_verifying_s": verifying,
            "time/idle_straggling_s": straggling,
        }

    # ------------------------------------------------------------------ the rollout engine

    def generating(self, slots: int) -> None:
        """A round begins on this rank, or another pass of it: so many decode slots work."""
        with self._lock:
            if self._round is None:
                self._round, self._rounds = Round(), self._rounds + 1
            now = self._clock()
            self._round.generating(now, slots)
            self._draw_slots(now)

    def at_work(self, slots: int) -> None:
        """So many of them do from now on: nothing is left that the others could sample."""
        with self._lock:
            if self._round is not None:
                now = self._clock()
                self._round.at_work(now, slots)
                self._draw_slots(now)

    def generated(self) -> None:
        """This rank's last rollout of the round, or the pass, is done; again: no effect."""
        with self._lock:
            if self._round is not None:
                now = self._clock()
                self._round.generated(now)
                self._draw_slots(now)

    # ------------------------------------------------------------------ verifier and ranks

    def checking(self) -> None:
        """Checks begin; again: no effect."""
        with self._lock:
            if self._round is not None and not self._round.checks_began:
                self._round.checks_began = self._clock()

    def checked(self) -> None:
        """A check is done; the last to say so is the round's last."""
        with self._lock:
            if self._round is not None:
                self._round.checks_done = self._clock()

    def met(self) -> Seconds | None:
        """All ranks are here: how this one spent the round; None if it sampled nothing itself."""
        with self._lock:
            round_, self._round = self._round, None
            if round_ is None or round_.began is None:
                return None
            now = self._clock()
            seconds = round_.met(now)
            done, checked = round_.rollouts_done, max(round_.rollouts_done, round_.checks_done)
            self._draw("rollouts", f"round {self._rounds}", round_.began, done, **seconds._asdict())
            if round_.checks_began:
                self._draw("checks", "checks", round_.checks_began, round_.checks_done)
            self._draw("idle", "verifying", done, checked)
            self._draw("idle", "straggling", checked, now)
            return seconds

    def count(self, ranks: Sequence[Seconds | None]) -> None:
        """What all ranks say of the round; only of those in GENERATE is account kept."""
        told = [seconds for seconds in ranks if seconds is not None]
        if told and self._phase is Phase.GENERATE:
            columns = zip(*told, strict=True)
            self._generation.append(Seconds(*(sum(column) / len(told) for column in columns)))

    # ------------------------------------------------------------------ files

    def step(self, number: int) -> None:
        """A step is done."""
        if self.trace:
            with self._lock:
                self.trace.step(number, self._clock())
                self.trace.flush()

    def close(self) -> None:
        """Draw no more."""
        if self.trace:
            with self._lock:
                self.trace.close()
            self.trace = None

    def _draw(
        self, lane: str, name: str, start: float, end: float, flush: bool = False, **notes: object
    ) -> None:
        if self.trace and end > start:
            with self._lock:
                self.trace.span(lane, name, start, end, **notes)
                if flush:
                    self.trace.flush()

    def _draw_slots(self, now: float) -> None:
        """The share of slots at work, when it is worth a new value."""
        share = self._round.share if self._round else 0.0
        bound = share != self._level and share in (0.0, 1.0)
        if self.trace and (bound or abs(share - self._level) >= 1 / LEVELS):
            self._level = share
            self.trace.level("slots at work", share, now)
