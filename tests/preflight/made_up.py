"""Findings of a healthy run on made-up nodes, to be spoilt by tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_prime.preflight.collectives import stages_of
from megatron_prime.preflight.facts import (
    GIB,
    Card,
    Clock,
    Disk,
    Driver,
    Facts,
    Gpu,
    Limits,
    Memory,
    Reduced,
    Seat,
    Source,
    Timing,
)
from megatron_prime.preflight.findings import Findings
from megatron_prime.preflight.needs import Needs

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "nccl": "2.27.5", "megatron_prime": "0.1 abc"}
NEEDS = Needs(
    ranks=4,
    open_files=2048,
    shm=GIB // 8,
    device=60 * GIB,
    host=100 * GIB,
    checkpoint=200 * GIB,
    export=15 * GIB,
    checkpoints=3,
    shares_gpus=True,
)


def seat(rank: int, per_node: int = 2) -> Seat:
    return Seat(rank, rank % per_node, f"gpu{rank // per_node:02}", 1000 + rank)


def facts(rank: int, per_node: int = 2) -> Facts:
    """What a healthy rank says."""
    here = seat(rank, per_node)
    uuid = f"GPU-{rank}"
    own = Facts(
        here,
        versions=VERSIONS,
        gpu=Gpu("H100", uuid, 80 * GIB, 79 * GIB, per_node),
        has_gpu_device=True,
        limits=Limits(65536, None, True),
    )
    if not here.leads:
        return own
    cards = tuple(Card(f"GPU-{rank + i}", "Default", 0) for i in range(per_node))
    return replace(
        own,
        driver=Driver("570.1", cards, ()),
        memory=Memory(1000 * GIB, 900 * GIB, 500 * GIB),
        disk=Disk(2000 * GIB, 9000 * GIB),
        ports="",
        sources={"model.hf": Source("/m", "11aa"), "data.train": Source("/t", "22bb")},
        sglang="0.5.17",
    )


def healthy(ranks: int = 4, per_node: int = 2) -> Findings:
    """Everything is as it should be."""
    every = range(ranks)
    found = Findings(ranks, waited_s=40.0, patience_s=15.0, needs=NEEDS)
    found.seats = {rank: seat(rank, per_node) for rank in every}
    found.facts = {rank: facts(rank, per_node) for rank in every}
    leaders = [rank for rank in every if rank and rank % per_node == 0]
    found.clocks = {rank: Clock(0.001, 0.0005) for rank in leaders}
    found.shared = {0: ""} | dict.fromkeys(leaders, "")
    found.hub = dict.fromkeys(leaders, "")
    found.stages = tuple(stages_of(list(found.nodes.values()), on_gpu=True))
    found.reduced = {rank: Reduced(timings(found, rank)) for rank in every}
    found.at = dict.fromkeys(every, 2 * len(found.stages) - 1)
    return found


def timings(found: Findings, rank: int, seconds: float = 0.01) -> tuple[Timing, ...]:
    """All-reduces of a rank in all stages that it has a group in."""
    return tuple(
        Timing(stage.name, group, 2**28, seconds, True)
        for stage in found.stages
        for group in stage.groups
        if rank in group
    )


def spoil(found: Findings, rank: int, **changes: Any) -> Findings:
    """One rank's facts, changed."""
    found.facts = {**found.facts, rank: replace(found.facts[rank], **changes)}
    return found
