"""Plans for people, and for programs: memory, predicted seconds, and layouts side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_prime.planner.advice import Advice
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import GIB, MemoryPlan, PhasePlan, RankPlan
from megatron_prime.planner.rates import Rates
from megatron_prime.planner.search import Layout, Search
from megatron_prime.planner.seconds import PhaseSeconds, StepSeconds

_ADVICE = 3  # changes that are named
_RANKS_PER_NODE = 8


def as_json(
    plan: MemoryPlan, advice: Sequence[Advice] = (), step: StepSeconds | None = None
) -> dict[str, Any]:
    """Bytes everywhere; `bytes` of a rank by owner and kind, kept ones and its works'.

    `seconds` are predictions, null where there is none.
    """
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
                "host_bytes": plan.host_bytes,
                "resident": dict(phase.resident),
                "working": {phase.working[0]: phase.working[1]} if phase.working[0] else {},
                **_seconds_json(step.of(phase.phase) if step else None),
            }
            for phase in plan.phases
        ],
        "step": None if step is None else _step_json(step),
        "peak": {"phase": peak.phase, "rank": peak.rank, "device_bytes": peak.device},
        "host_bytes": plan.host_bytes,
        "node_host_bytes": _node_host_bytes(plan),
        "device_bytes": plan.machine.device_bytes,
        "reserve_bytes": plan.machine.reserve_bytes,
        "fits": plan.fits,
        "advice": [
            {"change": found.change, "device_bytes": found.peak, "fits": found.fits}
            for found in advice
        ],
    }


def _seconds_json(phase: PhaseSeconds | None) -> dict[str, Any]:
    if phase is None:
        return {"seconds": None}
    return {
        "seconds": phase.seconds,
        "seconds_by": {"work": phase.work, "moves": phase.moves},
        "limit": phase.limit,
    }


def _step_json(step: StepSeconds) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "tokens": step.tokens,
        "tokens_per_s_per_gpu": step.tokens_per_s_per_gpu,
    }


def as_table(
    plan: MemoryPlan, advice: Sequence[Advice], step: StepSeconds | None = None, basis: str = ""
) -> str:
    """What stages hold, what phases need and how long they may take, and what would help.

    `basis`: what the seconds rest on.
    """
    lines = [*_stages(plan), "", *_phases(plan), "", *_verdict(plan, advice)]
    return "\n".join([*lines, *(["", *_seconds(step, basis)] if step else [])])


def short_table(plan: MemoryPlan, advice: Sequence[Advice]) -> str:
    """What phases need, and what would help."""
    return "\n".join([*_phases(plan), *_verdict(plan, advice)])


def _seconds(step: StepSeconds, basis: str) -> Iterator[str]:
    yield "predicted seconds per phase; no GPU has confirmed them"
    yield f"{'':16}{'seconds':>9}{'share':>7}{'moves':>8}  spent on"
    for phase in (*step.phases, *step.extra):
        share = f"{phase.seconds / step.seconds:>7.0%}" if phase in step.phases else f"{'-':>7}"
        spent = sorted(phase.work.items(), key=lambda one: -one[1])
        parts = ", ".join(f"{name} {value:.3g}" for name, value in spent if value >= 0.005)
        yield f"{phase.phase:16}{phase.seconds:>9.2f}{share}{phase.moving:>8.2f}  {parts}"
    yield (
        f"a step: {step.seconds:.1f} s, {step.tokens_per_s_per_gpu:.0f} tokens/s/GPU "
        f"({step.tokens / 1e6:.2f} M tokens trained on)"
    )
    if basis:
        yield basis


def basis(gpu: str, rates: Rates, expected: Expectations) -> str:
    """What predicted seconds rest on, in two lines."""
    return (
        f"with {gpu}: {rates.bf16_tflops:g} TFLOP/s in bf16 ({rates.compute_share:.0%} achieved), "
        f"{rates.fp8_tflops:g} in FP8 ({rates.fp8_share:.0%}), HBM {rates.hbm_gb_per_s:g} GB/s "
        f"({rates.hbm_share:.0%}), NVLink {rates.nvlink_gb_per_s:g}, network "
        f"{rates.network_gb_per_s:g}, PCIe {rates.pcie_gb_per_s:g} GB/s ({rates.link_share:.0%})\n"
        f"assumed: prompts of {expected.mean_prompt:g} tokens, responses of "
        f"{expected.mean_response:g} on average (spread {expected.spread:g}), "
        f"{expected.sampled_per_kept:g} prompts sampled for one that passes the filter"
    )


def search_json(found: Search, top: int) -> dict[str, Any]:
    """The first `top` layouts."""
    return {
        "tried": found.tried,
        "fitting": found.fitting,
        "layouts": [
            {
                "options": layout.options,
                "dp": layout.dp,
                "device_bytes": layout.device_bytes,
                "fits": layout.fits,
                **_step_json(layout.step),
                "phases": {phase.phase: phase.seconds for phase in layout.step.phases},
            }
            for layout in found.layouts[:top]
        ],
    }


def search_table(found: Search, top: int, basis: str) -> str:
    """The first `top` layouts, and the best one's lines for the TOML file."""
    critic = any(layout.step.of("update_critic") for layout in found.layouts)
    lines = [
        f"{found.fitting} of {found.tried} layouts fit; the fastest predicted ones",
        f"{'':4}{'TP':>3}{'PP':>4}{'CP':>4}{'DP':>5}{'eng TP':>8}{'seq par':>9}{'recompute':>11}"
        f"{'offload':>9}{'GiB':>7}{'gen':>8}{'score':>8}{'PRM':>8}"
        f"{'critic' * critic:>{8 * critic}}{'policy':>8}{'sync':>7}"
        f"{'step s':>9}{'tokens/s/GPU':>14}",
        *(_row(number, layout, critic) for number, layout in enumerate(found.layouts[:top], 1)),
    ]
    if not found.fitting:
        lines[0] = f"none of {found.tried} layouts fits; the one that needs least"
    first = [f"  {name} = {_toml(value)}" for name, value in found.layouts[0].options.items()]
    return "\n".join([*lines, "", "the first one's lines for the TOML file:", *first, "", basis])


def _row(number: int, layout: Layout, critic: bool) -> str:
    own = ("update_critic",) if critic else ()
    names = ("generate", "score", "update_prm", *own, "update_policy", "sync_weights")
    phases = [layout.step.of(name) for name in names]
    seconds = [f"{phase.seconds:.1f}" if phase else "-" for phase in phases]
    return (
        f"{number:>3} {layout.tp:>3}{layout.pp:>4}{layout.cp:>4}{layout.dp:>5}"
        f"{layout.rollout_tp:>8}{'yes' if layout.sequence_parallel else 'no':>9}"
        f"{layout.recompute:>11}{layout.offload:>9}{layout.device_bytes / GIB:>7.1f}"
        + "".join(f"{value:>8}" for value in seconds[:-1])
        + f"{seconds[-1]:>7}{layout.step.seconds:>9.1f}{layout.step.tokens_per_s_per_gpu:>14.0f}"
    )


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value)


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
    yield f"{'':16}{'rank':>6}{'kept':>10}{'work':>10}{'device':>10}  largest"
    for phase in plan.phases:
        kept = sum(phase.resident.values())
        columns = "".join(
            f"{nbytes / GIB:>10.2f}" for nbytes in (kept, phase.working[1], phase.device)
        )
        yield f"{phase.phase:16}{phase.rank:>6}{columns}  {_largest(phase)}"
    yield (
        f"host memory, page-locked: {plan.host_bytes / GIB:.2f} GiB on the rank that has most, "
        f"{_node_host_bytes(plan) / GIB:.2f} GiB at most on a node of {_RANKS_PER_NODE}"
    )


def _node_host_bytes(plan: MemoryPlan) -> int:
    return plan.host_bytes * min(_RANKS_PER_NODE, plan.world_size)


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
    if not plan.fits:
        yield from advice_lines(advice)


def advice_lines(advice: Sequence[Advice]) -> Iterator[str]:
    """The first few changes; nothing where none would help."""
    if advice:
        yield "what would help most, each by itself:"
    for found in advice[:_ADVICE]:
        fits = "fits" if found.fits else "does not fit yet"
        yield f"  {found.change}: {found.peak / GIB:.2f} GiB, {fits}"
