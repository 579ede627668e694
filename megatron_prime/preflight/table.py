"""The report of a preflight: a line per node, then every problem in a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_prime.preflight.collectives import ALL, GLOO, NODE
from megatron_prime.preflight.facts import GIB, Facts, Timing, ranges
from megatron_prime.preflight.findings import Findings, Problem, where, word

HEAD = (
    *("node", "ranks", "versions", "devices", "least free", "host free", "/dev/shm"),
    *("run.folder", "disk free", "ports", "clock", "all-reduce in node"),
)
UNKNOWN = "?"


def report(all_of: Findings, problems: Sequence[Problem], seconds: float, code: int) -> str:
    """The whole text."""
    kinds = version_kinds(all_of.facts)
    rows = [_row(all_of, node, members, kinds) for node, members in all_of.nodes.items()]
    lines = [*columns([HEAD, *rows]), "", *_footnotes(all_of, kinds)]
    if problems:
        lines.append("")
    for one in problems:
        lines.append(
            f"{word(one)}  {where(one.ranks, all_of.seats)}: found {one.found}; "
            f"wanted {one.wanted}; {one.mend}"
        )
    refusals, late, warnings = (
        sum(word(one) == kind for one in problems) for kind in ("REFUSED", "LATE", "warning")
    )
    stops = "refused" if refusals else "late" if late else ""
    verdict = "go" if not stops else stops if code else "go, as was asked for"
    without = f", {late} without an answer in time" if late else ""
    counted = f"{refusals} refusals, {warnings} warnings{without}" if problems else "no problems"
    lines += ["", f"[preflight] {verdict}: {counted}; {seconds:.1f} s"]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def version_kinds(facts: Mapping[int, Facts]) -> dict[str, str]:
    """A letter for each set of versions there is, by a line that lists them."""
    found: dict[str, str] = {}
    for rank in sorted(facts):
        if facts[rank].versions is not None:
            found.setdefault(_listed(facts[rank]), chr(ord("A") + min(len(found), 25)))
    return found


def _listed(facts: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in (facts.versions or {}).items())


def _row(
    all_of: Findings, node: str, members: Sequence[int], kinds: Mapping[str, str]
) -> tuple[str, ...]:
    present = [all_of.facts[rank] for rank in members if rank in all_of.facts]
    leader = next((facts for facts in present if facts.seat.leads), None)
    memory, disk = (leader.memory, leader.disk) if leader else (None, None)
    letters = sorted({kinds[_listed(facts)] for facts in present if facts.versions is not None})
    gpus = [facts.gpu for facts in present if facts.gpu]
    names = " or ".join(sorted({gpu.name for gpu in gpus}))
    shm = memory.shm_free if memory else None
    return (
        node,
        ranges(members),
        "".join(letters) or UNKNOWN,
        f"{len(gpus)} × {names}" if gpus else "CPU" if present else UNKNOWN,
        _gib(min(gpu.free for gpu in gpus)) if gpus else "",
        _gib(memory.available) if memory else UNKNOWN,
        _gib(shm) if shm is not None else UNKNOWN,
        _verdict(all_of.shared, members, "shared" if len(all_of.nodes) > 1 else "writable"),
        _gib(disk.free) if disk else UNKNOWN,
        _ports(all_of, leader),
        _clock(all_of, members),
        _timing(_timings(all_of, NODE, members)),
    )


def _verdict(problems: Mapping[int, str | None], members: Sequence[int], good: str) -> str:
    found = [problems[rank] for rank in members if rank in problems]
    if not found or found[0] is None:
        return UNKNOWN
    return "NO" if found[0] else good


def _ports(all_of: Findings, leader: Facts | None) -> str:
    if leader is None or leader.ports is None:
        return UNKNOWN
    return "NO" if leader.ports or all_of.hub.get(leader.seat.rank) else "ok"


def _clock(all_of: Findings, members: Sequence[int]) -> str:
    if 0 in members:
        return "0"
    clock = next((all_of.clocks[rank] for rank in members if rank in all_of.clocks), None)
    if clock is None:
        return UNKNOWN
    return f"{clock.offset * 1e3:+.1f} ± {clock.error * 1e3:.1f} ms"


def _timings(all_of: Findings, stage: str, ranks: Sequence[int]) -> list[Timing]:
    return [
        timing
        for one in all_of.reduced.values()
        for timing in one.timings
        if timing.stage == stage and set(ranks) <= set(timing.ranks)
    ]


def _timing(timings: Sequence[Timing]) -> str:
    """The slowest rank's."""
    if not timings:
        return UNKNOWN
    worst = max(timings, key=lambda timing: timing.seconds)
    speed = f", {worst.gigabytes_per_s:.2f} GB/s" if len(worst.ranks) > 1 else ""
    return f"{worst.seconds * 1e3:.1f} ms{speed}"


def _footnotes(all_of: Findings, kinds: Mapping[str, str]) -> Iterator[str]:
    for listed, letter in kinds.items():
        yield f"versions {letter}: {listed}"
    if servers := sorted({facts.sglang for facts in all_of.facts.values() if facts.sglang}):
        yield f"sglang: {' or '.join(servers)}"
    if drivers := {one.driver.version for one in all_of.leading.values() if one.driver} - {""}:
        yield f"GPU driver: {' or '.join(sorted(drivers))}"
    backends = {stage.name: stage.backend for stage in all_of.stages}
    for stage in (GLOO, ALL):
        if found := [t for one in all_of.reduced.values() for t in one.timings if t.stage == stage]:
            mib = found[0].size / 2**20
            yield f"all-reduce of all ranks, {backends[stage]}, {mib:.0f} MiB: {_timing(found)}"
    if all_of.skips_pairs:
        yield f"pairs of nodes: left out, {all_of.patience_s:.0f} s were left"
    if (needs := all_of.needs) is None:
        return
    if needs.no_plan:
        yield f"needs: no plan ({needs.no_plan})"
        return
    parts = []
    if needs.device is not None:
        parts.append(f"{_gib(needs.device)} per GPU")
    if needs.host is not None:
        parts.append(f"{_gib(needs.host)} of host memory per node")
    if needs.checkpoint is not None:
        disk = needs.checkpoints * needs.checkpoint + needs.export
        parts.append(
            f"{_gib(disk)} of disk ({needs.checkpoints} × {_gib(needs.checkpoint)}, and the model)"
        )
    yield f"needs, by plan: {', '.join(parts)}"


def _gib(size: int) -> str:
    value = size / GIB
    return f"{value / 1024:.2f} TiB" if value >= 1024 else f"{value:.3g} GiB"
