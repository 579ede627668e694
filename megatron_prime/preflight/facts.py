"""What a rank finds out about itself and its node: values that travel as JSON, and nothing else.

A field that is None was not answered: its probe was not this rank's to ask, hung (`silent`) or
failed (`failed`). Bytes are bytes, times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pydantic import TypeAdapter

GIB = 2**30
DIRTY_BYTES = 2 * GIB  # used on a GPU before the run: more than the contexts of a preflight


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank runs; the first that it says."""

    rank: int
    local_rank: int
    node: str
    pid: int

    @property
    def leads(self) -> bool:
        """Whether this rank answers for its node."""
        return self.local_rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A rank's device, as torch sees it; free: with this process's own CUDA context."""

    name: str
    uuid: str
    total: int
    free: int
    visible: int  # GPUs that this process may use


@dataclass(frozen=True, slots=True)
class Tenant:
    """A process on a GPU, as the driver sees it."""

    uuid: str
    pid: int
    name: str
    used: int


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU of the node, as the driver sees it."""

    uuid: str
    mode: str  # of computing: Default, Exclusive_Process, Prohibited
    ecc_errors: int | None  # uncorrected since the last reset; None: it does not count them


@dataclass(frozen=True, slots=True)
class Driver:
    """What nvidia-smi says; no cards where there is none."""

    version: str = ""
    cards: tuple[Card, ...] = ()
    tenants: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the host."""

    total: int
    available: int
    shm_free: int | None  # /dev/shm; None where there is none


@dataclass(frozen=True, slots=True)
class Limits:
    """ulimits; None: unlimited."""

    open_files: int | None
    locked_bytes: int | None
    has_infiniband: bool


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of run.folder."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Source:
    """A file or folder that a knob names: the same bytes on all nodes, as far as one looks."""

    path: str
    digest: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one rank; what concerns its whole node is asked by the node's first rank only."""

    seat: Seat
    config_problem: str = ""  # run.toml as this rank sees it; "": none
    versions: Mapping[str, str] | None = None
    gpu: Gpu | None = None
    has_gpu_device: bool | None = None  # a device file, whatever torch thinks of it
    asks_for_gpus: bool = True  # its launcher gave it some
    limits: Limits | None = None
    driver: Driver | None = None
    memory: Memory | None = None
    disk: Disk | None = None
    ports: str | None = None  # what is wrong; "": nothing
    sources: Mapping[str, Source] | None = None  # by the knob that names it
    sglang: str | None = None  # version
    silent: tuple[str, ...] = ()  # fields whose probes gave no answer in time
    failed: Mapping[str, str] = field(default_factory=dict)  # fields whose probes raised, and what


@dataclass(frozen=True, slots=True)
class Clock:
    """A node's clock against rank 0's."""

    offset: float  # positive: it is ahead
    error: float  # half of the fastest round trip


@dataclass(frozen=True, slots=True)
class Timing:
    """An all-reduce that came to its end."""

    stage: str
    ranks: tuple[int, ...]
    size: int
    seconds: float
    is_right: bool

    @property
    def gigabytes_per_s(self) -> float:
        """What each rank's link carries: 2 (n - 1) / n of the tensor, as NCCL's tests count."""
        n = len(self.ranks)
        return 2 * (n - 1) / n * self.size / self.seconds / 1e9


@dataclass(frozen=True, slots=True)
class Reduced:
    """All-reduces of one rank."""

    timings: tuple[Timing, ...]
    error: str = ""  # what ended them early


SEAT = TypeAdapter(Seat)
FACTS = TypeAdapter(Facts)
REDUCED = TypeAdapter(Reduced)


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` → `0–2, 5`."""
    ordered = sorted(numbers)
    starts = [n for n, before in zip(ordered, [None, *ordered], strict=False) if n - 1 != before]
    ends = [n for n, after in pairwise(ordered) if n + 1 != after] + ordered[-1:]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))


def nodes_of(seats: Mapping[int, Seat]) -> dict[str, list[int]]:
    """Ranks of each node, in the order of their first ranks."""
    found: dict[str, list[int]] = {}
    for rank in sorted(seats):
        found.setdefault(seats[rank].node, []).append(rank)
    return found
