"""All-reduces from small circles to large ones, checked and timed.

    gloo         all ranks, by TCP: what the ranks exchange Python objects with
    node         the ranks of each node; from here on NCCL where there are GPUs
    pairs        each node with its neighbour, then with its other one: a slow or broken node is in
                 two bad pairs, a bad link in one
    all          all ranks, by NCCL

In every stage a rank says that it has begun before it begins, so that of a stage that never ends is
known who came to it. Times are the best of several, after one that is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megatron_prime.preflight.facts import Reduced, Timing

MIB = 2**20
SIZE = {"gloo": 4 * MIB, "nccl": 256 * MIB}
REPEATS = 5
NEVER = timedelta(hours=1)  # the preflight ends long before any of torch's own clocks
GLOO, NODE, PAIRS, ALL = "gloo", "node", "pairs", "all"


class Stage(NamedTuple):
    """One all-reduce of each group; a rank is in one of them or in none."""

    name: str
    backend: str
    groups: tuple[tuple[int, ...], ...]


def stages_of(nodes: Sequence[Sequence[int]], on_gpu: bool) -> list[Stage]:
    """What is reduced on `nodes` (the ranks of each)."""
    backend = "nccl" if on_gpu else "gloo"
    everyone = tuple(rank for node in nodes for rank in node)
    found = [Stage(GLOO, "gloo", (everyone,))]
    found.append(Stage(NODE, backend, tuple(tuple(node) for node in nodes)))
    if len(nodes) > 2:
        even = [(i, i + 1) for i in range(0, len(nodes) - 1, 2)]
        odd = [(i, i + 1) for i in range(1, len(nodes) - 1, 2)]
        if len(nodes) % 2 == 0:
            odd.append((len(nodes) - 1, 0))
        for pairs in (even, odd):
            groups = tuple(tuple(sorted([*nodes[a], *nodes[b]])) for a, b in pairs)
            found.append(Stage(PAIRS, backend, groups))
    if len(nodes) > 1 and on_gpu:  # else it would be the first again
        found.append(Stage(ALL, backend, (everyone,)))
    return found


def reduce_all(
    rank: int,
    stages: Sequence[Stage],
    store: Store,
    device: torch.device,
    at: Callable[[int], None],
) -> Reduced:
    """Go through the stages. `at` is told 2 i before stage i, and 2 i + 1 after it."""
    timings: list[Timing] = []
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for number, stage in enumerate(stages):
            ranks = next((group for group in stage.groups if rank in group), None)
            at(2 * number)
            if number == 0:
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=len(ranks or ()), timeout=NEVER
                )
            if ranks:
                timings.append(reduce_one(rank, stage, ranks, device))
            at(2 * number + 1)
    except Exception as error:  # whatever gloo, NCCL or CUDA can't do is what is looked for
        first = str(error).strip().partition("\n")[0]
        return Reduced(tuple(timings), f"{type(error).__name__}: {first}")
    return Reduced(tuple(timings))


def reduce_one(rank: int, stage: Stage, ranks: tuple[int, ...], device: torch.device) -> Timing:
    """The all-reduce of one group; every rank gives its place in it, counted from 1."""
    on = device if stage.backend == "nccl" else torch.device("cpu")
    group: Any = None  # the default one
    if stage.name != GLOO:
        group = dist.new_group(
            list(ranks), timeout=NEVER, backend=stage.backend, use_local_synchronization=True
        )
    seconds, is_right = [], True
    size = SIZE[stage.backend]
    wanted = len(ranks) * (len(ranks) + 1) / 2
    for _ in range(1 + REPEATS):
        tensor = torch.full((size // 4,), ranks.index(rank) + 1.0, device=on)
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        seconds.append(time.perf_counter() - began)
        is_right = is_right and bool((tensor == wanted).all())
    return Timing(stage.name, ranks, size, min(seconds[1:]), is_right)
