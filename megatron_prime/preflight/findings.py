"""All that rank 0 has learnt, and what a problem is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_prime.preflight.collectives import Stage
from megatron_prime.preflight.facts import Clock, Facts, Reduced, Seat, nodes_of, ranges
from megatron_prime.preflight.needs import Needs


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be, and who has it."""

    ranks: tuple[int, ...]
    found: str
    wanted: str
    mend: str
    refuses: bool = True  # else it is a warning
    late: bool = False  # no answer in time: it may come at the next look


@dataclass(slots=True)
class Findings:
    """Filled in step by step; what could not be asked stays empty."""

    ranks: int  # of the run
    waited_s: float = 0.0  # for ranks to come
    patience_s: float = 0.0  # for all-reduces
    skips_pairs: bool = False  # too little of it was left for them
    seats: Mapping[int, Seat] = field(default_factory=dict)
    facts: Mapping[int, Facts] = field(default_factory=dict)
    needs: Needs | None = None
    clocks: Mapping[int, Clock | None] = field(default_factory=dict)  # by each node's first rank
    shared: Mapping[int, str | None] = field(default_factory=dict)  # what is wrong; "": nothing
    hub: Mapping[int, str | None] = field(default_factory=dict)  # the same, of ways to rank 0
    stages: tuple[Stage, ...] = ()
    reduced: Mapping[int, Reduced] = field(default_factory=dict)
    at: Mapping[int, int] = field(default_factory=dict)  # of each rank: see `reduce_all`

    @property
    def nodes(self) -> dict[str, list[int]]:
        """Ranks of each node that has come."""
        return nodes_of(self.seats)

    def node_of(self, rank: int) -> tuple[int, ...]:
        """All ranks of a rank's node: whom its node's problems concern."""
        return tuple(self.nodes[self.seats[rank].node])

    @property
    def leading(self) -> dict[int, Facts]:
        """Facts of the ranks that speak for their nodes."""
        return {rank: facts for rank, facts in self.facts.items() if facts.seat.leads}


def where(ranks: Iterable[int], seats: Mapping[int, Seat]) -> str:
    """Whom a problem concerns: whole nodes by their names, else ranks on nodes."""
    concerned, nodes = set(ranks), nodes_of(seats)
    if not concerned <= set(seats):
        return _named(sorted(concerned))
    if concerned == set(seats):
        return f"all {len(nodes)} nodes" if len(nodes) > 1 else next(iter(nodes))
    parts = []
    for node, members in nodes.items():
        here = sorted(concerned & set(members))
        if here:
            parts.append(node if here == members else f"{_named(here)} on {node}")
    return ", ".join(parts)


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"


def merged(problems: Iterable[Problem]) -> list[Problem]:
    """Refusals first, and the same problem of several ranks once."""
    found: dict[tuple[str, str, str, bool, bool], set[int]] = {}
    for one in problems:
        key = one.found, one.wanted, one.mend, one.refuses, one.late
        found.setdefault(key, set()).update(one.ranks)
    whole = [Problem(tuple(sorted(ranks)), *key) for key, ranks in found.items()]
    return sorted(whole, key=lambda one: (not one.refuses, one.late))


def word(problem: Problem) -> str:
    """What a problem's line begins with."""
    if not problem.refuses:
        return "warning"
    return "LATE" if problem.late else "REFUSED"


def code_of(problems: Iterable[Problem], refused: int, late: int) -> int:
    """The verdict: whoever is refused counts more than whoever is late."""
    words = {word(one) for one in problems}
    return refused if "REFUSED" in words else late if "LATE" in words else 0
