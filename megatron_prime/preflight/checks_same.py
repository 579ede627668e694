"""What has to be the same on all ranks or nodes: those that differ from most others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from megatron_prime.preflight.facts import GIB, Facts, Gpu
from megatron_prime.preflight.findings import Findings, Problem

MENDS = {
    "megatron_prime": "start all ranks from one checkout, on a file system that all nodes see",
    "configuration": "start all ranks with the same RUN.toml and --section.key=value",
    "sglang": "rollout.sglang_python: take an interpreter that all nodes share",
}
SAME_SIZE = 0.02  # totals of one kind of GPU differ by tenths of a GiB
ENVIRONMENT = "take one interpreter (PYTHON) or container that all nodes share"


class Odd(NamedTuple):
    """A rank whose value is not that of most."""

    rank: int
    found: str
    usual: str
    others: int  # that have the usual one


def odd_ones(values: Mapping[int, str]) -> list[Odd]:
    """Where as many have one value as another, that of the lowest rank counts as usual."""
    counts = Counter(values[rank] for rank in sorted(values))
    if len(counts) < 2:
        return []
    usual, others = counts.most_common(1)[0]
    return [
        Odd(rank, value, usual, others) for rank, value in sorted(values.items()) if value != usual
    ]


def version_problems(all_of: Findings) -> Iterator[Problem]:
    """Of all that `probes.versions` tells, SGLang and the driver."""
    facts = all_of.facts
    versions = {rank: one.versions for rank, one in facts.items() if one.versions is not None}
    for name in dict.fromkeys(name for found in versions.values() for name in found):
        values = {rank: found.get(name, "none") for rank, found in versions.items()}
        yield from _differ(name, values, MENDS.get(name, ENVIRONMENT))
    servers = _differ("sglang", _of(facts, lambda one: one.sglang), MENDS["sglang"])
    yield from _of_nodes(all_of, servers)
    drivers = _of(facts, lambda one: one.driver.version if one.driver else None)
    mend = "ask the site; NCCL and CUDA graphs may behave differently there"
    yield from _of_nodes(all_of, _differ("GPU driver", drivers, mend, refuses=False))


def source_problems(all_of: Findings) -> Iterator[Problem]:
    """Model and data: there, and alike."""
    leading = all_of.leading
    for rank, facts in leading.items():
        for knob, source in (facts.sources or {}).items():
            if source.problem:
                found = f"{knob} = {source.path}: {source.problem}"
                wanted = "a whole model" if knob.endswith("hf") else "a file"
                yield Problem(all_of.node_of(rank), found, wanted, f"mend it, or set {knob}")
    for knob in dict.fromkeys(k for facts in leading.values() for k in facts.sources or {}):
        digests = {
            rank: facts.sources[knob].digest
            for rank, facts in leading.items()
            if facts.sources and knob in facts.sources and not facts.sources[knob].problem
        }
        mend = f"{knob}: a path on a file system that all nodes share, or the same copy on each"
        yield from _of_nodes(all_of, _differ(f"{knob} of content", digests, mend))


def gpu_kinds(all_of: Findings) -> Iterator[Problem]:
    """One kind of GPU, and as many ranks on every node."""
    sizes: list[int] = []
    kinds = {
        rank: _kind(facts.gpu, sizes) if facts.gpu else "none"
        for rank, facts in sorted(all_of.facts.items())
        if "gpu" not in (*facts.silent, *facts.failed)
    }
    mend = "ask for one kind of GPU (sbatch --gpus-per-node=h100:8, --constraint); see nvidia-smi"
    yield from _differ("GPU", kinds, mend)
    if len(all_of.seats) == all_of.ranks:
        numbers = {members[0]: str(len(members)) for members in all_of.nodes.values()}
        mend = "sbatch --ntasks-per-node: as many on each node"
        yield from _of_nodes(all_of, _differ("number of ranks", numbers, mend))


def _kind(gpu: Gpu, sizes: list[int]) -> str:
    """Name and size; what drivers keep for themselves makes no other kind. Adds to `sizes`."""
    alike = (size for size in sizes if abs(size - gpu.total) <= SAME_SIZE * size)
    if (size := next(alike, None)) is None:
        sizes.append(size := gpu.total)
    return f"{gpu.name}, {size / GIB:.0f} GiB"


def _differ(
    name: str, values: Mapping[int, str], mend: str, refuses: bool = True
) -> Iterator[Problem]:
    for odd in odd_ones(values):
        wanted = f"{odd.usual} as on {odd.others} of {len(values)}"
        yield Problem((odd.rank,), f"{name} {odd.found}", wanted, mend, refuses)


def _of_nodes(all_of: Findings, problems: Iterable[Problem]) -> Iterator[Problem]:
    """The same of whole nodes, of which one rank was asked."""
    for one in problems:
        yield replace(one, ranks=all_of.node_of(one.ranks[0]))


def _of(facts: Mapping[int, Facts], value: Callable[[Facts], str | None]) -> dict[int, str]:
    found = {rank: value(one) for rank, one in facts.items() if one.seat.leads}
    return {rank: text for rank, text in found.items() if text is not None}
