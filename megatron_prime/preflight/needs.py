"""What the run needs of a node, by the planner: memory, disk, files.

A checkpoint holds weights, masters and moments of policy and PRM, each value once: what tensor- and
pipeline-parallel ranks hold, and what the distributed optimizer spreads over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.door import machine_of
from megatron_prime.planner.engine_bytes import NoRoomForServers
from megatron_prime.planner.memory import GIB, MemoryPlan
from megatron_prime.planner.table import plan_of

OPEN_FILES, OPEN_FILES_PER_RANK = 1024, 8  # sockets of gloo, NCCL and the hub, to every other rank
SHM_PER_GPU = 64 * 2**20  # a guess of NCCL's buffers between the GPUs of a node: it only warns


@dataclass(frozen=True, slots=True)
class Needs:
    """In bytes, but for the numbers."""

    ranks: int  # of the run
    open_files: int
    shm: int  # per node
    shm_is_sure: bool = False  # counted, not guessed
    gpus_seen: int = 1  # that each rank has to see
    left_over: int = 0  # bytes of saves that did not end, which the next one deletes
    device: int | None = None  # per GPU at the worst moment; None: no GPU, or no plan
    host: int | None = None  # per node: what leaves its GPUs, or, without GPUs, all there is
    checkpoint: int | None = None
    export: int = 0
    checkpoints: int = 1  # that the disk still has to take
    keeps_all: bool = False
    shares_gpus: bool = False  # with servers, which are processes of their own
    no_plan: str = ""  # why there is none
    no_room: str = ""  # why `train` would refuse the plan at its door
    start_anyway: bool = False  # memory.start_anyway: whatever does not fit is a warning


def needs_of(
    config: RunConfig, ranks: int, local_ranks: int, device_bytes: int | None, there: int
) -> Needs:
    """`device_bytes`: of the smallest GPU, None without one; `there`: checkpoints that exist."""
    on_gpu = device_bytes is not None
    shm = SHM_PER_GPU * local_ranks if on_gpu else 0
    with_servers = config.rollout.engine == "sglang"
    seen = config.rollout.tensor_parallel_size if on_gpu and with_servers else 1
    if with_servers and not on_gpu:  # new weights go through it
        shm = int(2 * config.rollout.sync_bucket_mib * 2**20) * local_ranks
    known = Needs(
        ranks,
        OPEN_FILES + OPEN_FILES_PER_RANK * ranks,
        shm,
        shm_is_sure=not on_gpu,
        gpus_seen=seen,
        left_over=left_over(config.run.folder / "checkpoints"),
        start_anyway=config.memory.start_anyway,
    )
    machine = machine_of(config, device_bytes, on_gpu)
    try:
        _, plan = plan_of(config, ranks, machine)
    except NoRoomForServers as error:
        why = str(error).partition("\n")[0]
        return replace(known, no_plan=why, no_room=why)
    except ConfigError as error:
        return replace(known, no_plan=str(error).partition("\n")[0])
    sizes = config.parallel
    replicas = ranks // (sizes.tp * sizes.pp)
    stages = [rank.kept for rank in plan.ranks]
    peak = plan.peak.device
    if not on_gpu and with_servers:  # without a limit it has no useful size
        peak -= plan.peak.resident.get("engine.kv_cache", 0)
    return replace(
        known,
        device=peak if on_gpu else None,
        host=(plan.host_bytes if on_gpu else peak) * local_ranks,
        checkpoint=checkpoint_bytes(stages, sizes.tp, replicas if on_gpu else 1),
        export=sizes.tp * sum(kept["policy.weights"] for kept in stages),
        checkpoints=checkpoints_to_come(config, there),
        keeps_all=config.checkpoint.keep == 0,
        shares_gpus=on_gpu and with_servers,
        no_room=no_room(plan) if machine is not None else "",
    )


def left_over(checkpoints: Path) -> int:
    """Bytes of what a run that was killed while it saved or removed has left."""
    found = 0
    for name in ("writing_*", "removing_*"):
        for folder in checkpoints.glob(name):
            for file in folder.rglob("*"):
                with suppress(OSError):  # it goes just now
                    found += file.stat().st_size if file.is_file() else 0
    return found


def no_room(plan: MemoryPlan) -> str:
    """Why `train` refuses this plan before it loads anything; nothing: it does not."""
    if plan.fits:
        return ""
    peak, machine = plan.peak.device / GIB, plan.machine
    return (
        f"a plan of {peak:.1f} GiB at its peak and {machine.reserve_bytes / GIB:.1f} in reserve "
        f"for a device of {machine.device_bytes / GIB:.1f}"
    )


def checkpoint_bytes(stages: list[Mapping[str, int]], tp: int, shards: int) -> int:
    """Of all ranks together, from what the first rank of each pipeline stage keeps.

    `shards`: how many ranks the optimizer's states of one tensor are spread over.
    """
    of = {"weights": 1, "masters": shards, "moments": shards}
    return tp * sum(
        times * kept.get(f"{model}.{kind}", 0)
        for kept in stages
        for model in ("policy", "prm", "critic")
        for kind, times in of.items()
    )


def checkpoints_to_come(config: RunConfig, there: int) -> int:
    """How many more have to fit at once: what is kept, and the one being written."""
    every, keep = config.checkpoint.every, config.checkpoint.keep
    saved = -(-config.run.steps // every) if every else 1
    at_once = saved if keep == 0 else min(saved, keep + 1)
    return max(1, at_once - there)
