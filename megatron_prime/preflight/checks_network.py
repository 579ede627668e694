"""What lies between the nodes: who came, clocks, the shared folder, all-reduces."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median_low

from megatron_prime.preflight.collectives import ALL, GLOO, NODE, PAIRS
from megatron_prime.preflight.facts import Timing, nodes_of, ranges
from megatron_prime.preflight.findings import Findings, Problem

CLOCK_WARNS_S, CLOCK_REFUSES_S = 1.0, 60.0
SLOW = 2.0  # times the median
SLOW_FROM_S = 5e-3  # below that, times are the scheduler's
CIRCLES = {
    GLOO: "the all-reduce of all ranks by gloo",
    NODE: "the all-reduce inside the node",
    PAIRS: "the all-reduce of two nodes",
    ALL: "the all-reduce of all ranks",
}
TCP = "GLOO_SOCKET_IFNAME: the network interface that all nodes share; see firewalls between nodes"
NETWORK = (
    "NCCL_SOCKET_IFNAME, NCCL_IB_HCA: the network that the nodes share; NCCL_DEBUG=INFO says what "
    "it takes; or sbatch --exclude"
)
INSIDE = "NCCL_DEBUG=INFO says more; see nvidia-smi topo -m and dmesg; or sbatch --exclude"
MENDS = {GLOO: TCP, NODE: INSIDE, PAIRS: NETWORK, ALL: NETWORK}


def presence_problems(all_of: Findings) -> Iterator[Problem]:
    """Ranks that did not come, or came and fell silent."""
    absent = tuple(rank for rank in range(all_of.ranks) if rank not in all_of.seats)
    if absent:
        yield Problem(
            absent,
            f"did not come within {all_of.waited_s:.0f} s",
            f"all {all_of.ranks} ranks",
            "see whether their nodes are up and reach rank 0's, and their tasks' output; where "
            "Python starts slowly, raise --seconds",
            late=True,
        )
    for rank in sorted(all_of.seats):
        if rank not in all_of.facts:
            yield Problem(
                (rank,),
                "came, but told nothing",
                "its facts",
                "it was killed or hangs: see its output and its node",
                late=True,
            )
    for node, members in all_of.nodes.items():
        if members != list(range(members[0], members[0] + len(members))):
            yield Problem(
                tuple(members),
                f"ranks {ranges(members)} on {node}",
                "ranks of a node in a row: tensor-parallel neighbours are on one node",
                "srun --distribution=block",
            )


def clock_problems(all_of: Findings) -> Iterator[Problem]:
    """Against rank 0's clock."""
    for rank, clock in all_of.clocks.items():
        if clock is None:
            problem = Problem(
                all_of.node_of(rank), "no answer about the time", "one", "see that node", late=True
            )
            yield problem
        elif abs(clock.offset) - clock.error > CLOCK_WARNS_S:
            ahead = "ahead of" if clock.offset > 0 else "behind"
            yield Problem(
                all_of.node_of(rank),
                f"a clock {abs(clock.offset):.1f} s {ahead} rank 0's (± {clock.error:.3f} s)",
                f"{CLOCK_WARNS_S:g} s at most: the timeline lays ranks side by side by their "
                "clocks, and files look newer than they are",
                "see chronyc tracking or timedatectl on that node",
                refuses=abs(clock.offset) - clock.error > CLOCK_REFUSES_S,
            )


def folder_problems(all_of: Findings) -> Iterator[Problem]:
    """run.folder, and ways to rank 0 by a port that the system chooses."""
    for rank, problem in all_of.shared.items():
        if problem != "":
            yield Problem(
                all_of.node_of(rank),
                problem or "no answer about run.folder",
                "one folder that all nodes see and may write to",
                "run.folder: an absolute path on a shared file system, with rights",
                late=problem is None,
            )
    for rank, problem in all_of.hub.items():
        if problem:
            yield Problem(
                all_of.node_of(rank),
                problem,
                "a way to any port of rank 0's node, over which lost ranks are noticed",
                "the site's firewall between nodes; MASTER_ADDR: another address of that node",
            )


def reduce_problems(all_of: Findings) -> Iterator[Problem]:
    """All-reduces that did not end, failed, were wrong, or slow."""
    if not all_of.stages:
        return
    for rank, one in all_of.reduced.items():
        begun = all_of.at.get(rank, 0) // 2
        if one.error:
            stage = all_of.stages[begun].name
            late = one.error.startswith("DistStoreError")  # waited in vain for another rank
            wanted = f"{CIRCLES[stage]} to end"
            yield Problem((rank,), one.error, wanted, MENDS[stage], late=late)
        for timing in one.timings:
            if not timing.is_right:
                yield Problem(
                    (rank,),
                    f"a wrong sum of {CIRCLES[timing.stage]}",
                    "the sum",
                    "broken hardware: sbatch --exclude its node, and tell the site",
                )
    yield from _hung(all_of)
    yield from slow_problems(all_of)


def _hung(all_of: Findings) -> Iterator[Problem]:
    """Of those that did not come to the end, the ones that are least far hold up the others."""
    hung = {rank: all_of.at.get(rank, -1) for rank in all_of.seats if rank not in all_of.reduced}
    if not hung or any(one.error for one in all_of.reduced.values()):
        return  # who waits for one that failed is not to blame
    least = min(hung.values())
    ranks = tuple(rank for rank, at in hung.items() if at == least)
    waits = "" if len(ranks) == len(hung) else f"; {len(hung) - len(ranks)} others wait for it"
    begun = least >= 0 and least % 2 == 0
    number = least // 2 if begun else (least + 1) // 2
    stage = all_of.stages[min(number, len(all_of.stages) - 1)].name
    did = "end" if begun else "begin"
    yield Problem(
        ranks,
        f"did not {did} {CIRCLES[stage]} within {all_of.patience_s:.0f} s{waits}",
        "its end",
        MENDS[stage],
        late=True,
    )


def slow_problems(all_of: Findings) -> Iterator[Problem]:
    """Nodes, and pairs of nodes, that take much longer than most."""
    nodes = nodes_of(all_of.seats)
    timings = {
        (timing.stage, timing.ranks): timing
        for one in all_of.reduced.values()
        for timing in one.timings
    }
    inside = [timing for (stage, _), timing in timings.items() if stage == NODE]
    for timing in slow_ones(inside):
        yield _slow(timing, timing.ranks, median_low([one.seconds for one in inside]))
    pairs = [timing for (stage, _), timing in timings.items() if stage == PAIRS]
    usual = median_low([one.seconds for one in pairs]) if pairs else 0.0
    slow = slow_ones(pairs)
    blamed = [
        tuple(members)
        for members in nodes.values()
        if len(own := [one for one in pairs if set(members) <= set(one.ranks)]) > 1
        and all(one in slow for one in own)
    ]
    for members in blamed:
        worst = max(
            (one for one in slow if set(members) <= set(one.ranks)), key=lambda one: one.seconds
        )
        yield _slow(worst, members, usual)
    for one in slow:
        if not any(set(members) <= set(one.ranks) for members in blamed):
            yield _slow(one, one.ranks, usual)


def slow_ones(timings: list[Timing]) -> list[Timing]:
    """Those of the same stage that take `SLOW` times the median or more."""
    if len(timings) < 2:
        return []
    usual = median_low([one.seconds for one in timings])
    return [one for one in timings if one.seconds > max(SLOW * usual, SLOW_FROM_S)]


def _slow(timing: Timing, ranks: tuple[int, ...], usual: float) -> Problem:
    return Problem(
        ranks,
        f"{timing.seconds * 1e3:.1f} ms for {CIRCLES[timing.stage]}",
        f"{usual * 1e3:.1f} ms, the median, or less than {SLOW:g} times as long",
        MENDS[timing.stage],
        refuses=False,
    )
