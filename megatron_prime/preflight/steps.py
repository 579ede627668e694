"""What rank 0 and the others share: the timetable, the signal to go, and what each pins up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter

from megatron_prime.preflight.collectives import Stage, reduce_all
from megatron_prime.preflight.exchange import Board, meet
from megatron_prime.preflight.facts import FACTS, REDUCED, SEAT, Reduced, Seat
from megatron_prime.preflight.probes import Probes
from megatron_prime.runtime.rendezvous import Rendezvous

# Of all seconds: until then ranks come, probes answer, nodes answer, all-reduces end, all ends.
TIMETABLE = (2 / 3, 0.72, 0.8, 0.92, 1.0)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command line, and what the launcher decides."""

    seconds: float = 60.0
    refused: int = 78  # exit code of a refusal; 0: it is said, and that is all
    late: int = 77  # the same, where nobody is refused but somebody did not answer in time
    serves_store: bool = True  # rank 0 does; under torchrun its agent
    asks_for_gpus: bool = True  # of this process's launcher
    decided: Callable[[int], None] = lambda code: None  # told the verdict, before the end


class Times(NamedTuple):
    """Moments of time.monotonic."""

    come: float
    probes: float
    answers: float
    reduce: float
    end: float

    @property
    def facts(self) -> float:
        """Until then facts are waited for: a little after the last are pinned up."""
        return self.probes + (self.answers - self.probes) / 4

    @property
    def clocks(self) -> float:
        """Until then nodes are asked for the time; what else they answer comes after it."""
        return self.probes + (self.answers - self.probes) * 3 / 4

    @classmethod
    def of(cls, start: float, seconds: float) -> Times:
        """For a preflight that began at `start`."""
        return cls(*(start + part * seconds for part in TIMETABLE))


@dataclass(frozen=True, slots=True)
class Go:
    """What rank 0 says when the ranks are there."""

    left_s: tuple[float, ...]  # until the end of each of the timetable's parts
    trial: str  # of the shared folder
    port: int  # of rank 0's node, to be called
    code: int | None = None  # it is over already

    def times(self) -> Times:
        """By this process's clock."""
        now = time.monotonic()
        return Times(*(now + left for left in self.left_s))


GO = TypeAdapter(Go)
STAGES = TypeAdapter(tuple[Stage, ...])


class Begun(Generic[T]):
    """A call in a thread that nobody has to wait for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._found: list[T] = []
        self._thread = threading.Thread(target=lambda: self._found.append(call()), daemon=True)
        self._thread.start()

    def found(self, until: float) -> T | None:
        """What it returned, None if it has not in time."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return self._found[0] if self._found else None


def within(call: Callable[[], T], until: float) -> T | None:
    """What `call` returns, None if it has not in time; it then goes on in its thread."""
    return Begun(call).found(until)


def reduce(
    here: Rendezvous, board: Board, stages: tuple[Stage, ...], until: float
) -> Reduced | None:
    """This rank's all-reduces, and where it is on the board; None if they don't end in time."""
    device = torch.device("cpu")
    if any(stage.backend == "nccl" for stage in stages):
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())

    def all_of_them() -> Reduced:
        # A store of its own: the process group would keep this thread's waiting in it.
        store = meet(here, False, until)
        return reduce_all(
            here.rank, stages, store, device, lambda at: board.pin(f"at/{here.rank}", str(at))
        )

    return within(all_of_them, until)


def pin_seat(board: Board, seat: Seat) -> None:
    """Say where this rank sits."""
    board.pin(f"seat/{seat.rank}", SEAT.dump_json(seat).decode())


def pin_facts(board: Board, probes: Probes, until: float) -> None:
    """Say what this rank has found."""
    facts = probes.facts(until)
    board.pin(f"facts/{facts.seat.rank}", FACTS.dump_json(facts).decode())


def pin_reduced(board: Board, rank: int, reduced: Reduced | None) -> None:
    """Say how the all-reduces went, if they came to an end."""
    if reduced is not None:
        board.pin(f"reduced/{rank}", REDUCED.dump_json(reduced).decode())
