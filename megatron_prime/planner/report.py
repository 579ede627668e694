"""A memory plan for people, and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_prime.planner.advice import Advice
from megatron_prime.planner.memory import GIB, MemoryPlan, PhasePlan, RankPlan

_ADVICE = 3  # changes that are named


def as_json(plan: MemoryPlan, advice: Sequence[Advice] = ()) -> dict[str, Any]:
    """Bytes everywhere; `bytes` of a rank by owner and kind, kept ones and its works'."""
    peak = plan.peak
    return {
        "ranks": [
            {
                "rank": rank.rank,
                "tp": rank.place.tp,
                "pp": rank.place.pp,
                "dp": rank.place.dp,
                "cp": rank.place.cp,
                "parameters": rank.parameters,
                "bytes": {**rank.kept, **rank.work},
            }
            for rank in plan.ranks
        ],
        "phases": [
            {
                "phase": phase.phase,
                "rank": phase.rank,
                "device_bytes": phase.device,
                "host_bytes": phase.host,
                "resident": dict(phase.resident),
                "working": {phase.working[0]: phase.working[1]} if phase.working[0] else {},
            }
            for phase in plan.phases
        ],
        "peak": {"phase": peak.phase, "rank": peak.rank, "device_bytes": peak.device},
        "device_bytes": plan.machine.device_bytes,
        "reserve_bytes": plan.machine.reserve_bytes,
        "fits": plan.fits,
        "advice": [
            {"change": found.change, "device_bytes": found.peak, "fits": found.fits}
            for found in advice
        ],
    }


def as_table(plan: MemoryPlan, advice: Sequence[Advice]) -> str:
    """What stages hold, what phases need, and what would help."""
    return "\n".join([*_stages(plan), "", *_phases(plan), "", *_verdict(plan, advice)])


def _stages(plan: MemoryPlan) -> Iterator[str]:
    """The first rank of each pipeline stage; its tensor-parallel neighbours hold the same."""
    first: dict[int, RankPlan] = {}
    for rank in plan.ranks:
        first.setdefault(rank.place.pp, rank)
    yield "GiB per rank, by pipeline stage (its first rank)"
    heads = [f"stage {stage}" for stage in first]
    yield f"{'':24}" + "".join(f"{head:>11}" for head in heads)
    counts = "".join(f"{rank.parameters / 1e6:>10.1f}M" for rank in first.values())
    yield f"{'policy parameters':24}{counts}"
    names = list(next(iter(first.values())).kept)
    for name in [*names, *next(iter(first.values())).work]:
        values = [{**rank.kept, **rank.work}.get(name, 0) for rank in first.values()]
        if any(values):
            yield f"{name:24}" + "".join(f"{value / GIB:>11.2f}" for value in values)


def _phases(plan: MemoryPlan) -> Iterator[str]:
    yield "GiB per phase, on the rank that needs most"
    yield f"{'':16}{'rank':>6}{'kept':>10}{'work':>10}{'device':>10}{'host':>10}  largest"
    for phase in plan.phases:
        kept = sum(phase.resident.values())
        columns = "".join(
            f"{nbytes / GIB:>10.2f}"
            for nbytes in (kept, phase.working[1], phase.device, phase.host)
        )
        yield f"{phase.phase:16}{phase.rank:>6}{columns}  {_largest(phase)}"


def _largest(phase: PhasePlan) -> str:
    parts = {**phase.resident, **({phase.working[0]: phase.working[1]} if phase.working[0] else {})}
    if not parts:
        return "-"
    name = max(parts, key=lambda part: parts[part])
    return f"{name} {parts[name] / GIB:.2f}"


def _verdict(plan: MemoryPlan, advice: Sequence[Advice]) -> Iterator[str]:
    peak, machine = plan.peak, plan.machine
    yield (
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {peak.device / GIB:.2f} GiB in {peak.phase} "
        f"on rank {peak.rank}, and {machine.reserve_bytes / GIB:g} GiB in reserve, of "
        f"{machine.device_bytes / GIB:g} GiB"
    )
    if not plan.fits and advice:
        yield "what would help most, each by itself:"
        for found in advice[:_ADVICE]:
            fits = "fits" if found.fits else "does not fit yet"
            yield f"  {found.change}: {found.peak / GIB:.2f} GiB, {fits}"
