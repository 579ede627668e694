"""What a node has, against what the run needs of it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prime.preflight.facts import DIRTY_BYTES, GIB, Facts, Gpu, Tenant
from megatron_prime.preflight.findings import Findings, Problem
from megatron_prime.preflight.needs import Needs

TENANTS_NAMED = 3
ALONE = {"Exclusive_Process": 1, "Prohibited": 0}  # processes that a GPU in this mode takes


def gpu_problems(all_of: Findings) -> Iterator[Problem]:
    """A GPU for each rank, with memory, in good health."""
    for members in all_of.nodes.values():
        present = [all_of.facts[rank] for rank in members if rank in all_of.facts]
        gpus = {facts.seat.rank: facts.gpu for facts in present if facts.gpu}
        yield from _one_each(gpus, all_of.needs.gpus_seen if all_of.needs else 1)
        leader = next((facts for facts in present if facts.driver), None)
        tenants = leader.driver.tenants if leader and leader.driver else ()
        ours = {all_of.seats[rank].pid for rank in members}
        others = [one for one in tenants if one.pid not in ours]
        for rank, gpu in gpus.items():
            there = [one for one in others if one.uuid == gpu.uuid]
            yield from _free(rank, gpu, there, all_of.needs)
        if leader:
            uuids = {gpu.uuid for gpu in gpus.values()} - {""}
            shared = all_of.needs is not None and all_of.needs.shares_gpus
            yield from _cards(leader, tuple(members), uuids, shared)
    for rank, facts in all_of.facts.items():
        if facts.gpu is None and facts.has_gpu_device and "gpu" not in facts.silent:
            yield Problem(
                (rank,),
                "a GPU's device file, but torch finds no GPU",
                "torch with CUDA, and a driver that is new enough for it",
                "PYTHON: an interpreter with torch for CUDA; look at nvidia-smi, and at "
                "CUDA_VISIBLE_DEVICES",
                refuses=facts.asks_for_gpus,  # a CPU's run may be on a node that has GPUs
            )


def _one_each(gpus: dict[int, Gpu], seen: int) -> Iterator[Problem]:
    for rank, gpu in gpus.items():
        if gpu.visible < seen:
            yield Problem(
                (rank,),
                f"{gpu.visible} visible GPUs",
                f"the {seen} of a rollout server (rollout.tensor_parallel_size)",
                "sbatch --gpus-per-node, not --gpus-per-task",
            )
    uuids = {gpu.uuid for gpu in gpus.values() if gpu.uuid}
    for uuid in sorted(uuids):
        sharing = tuple(rank for rank, gpu in gpus.items() if gpu.uuid == uuid)
        if len(sharing) > 1:
            yield Problem(
                sharing,
                f"one GPU for {len(sharing)} ranks",
                "one for each rank",
                "fewer --ntasks-per-node, or more --gpus-per-node",
            )


def _free(rank: int, gpu: Gpu, others: list[Tenant], needs: Needs | None) -> Iterator[Problem]:
    if needs is None or needs.device is None:
        return
    named = [f"pid {one.pid} {one.name} {one.used / GIB:.1f} GiB" for one in others]
    who = f", beside {'; '.join(named[:TENANTS_NAMED])}" if named else ""
    found = f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free on its GPU{who}"
    if gpu.free < needs.device:
        yield Problem(
            (rank,),
            found,
            f"{needs.device / GIB:.1f} GiB for the plan's worst phase",
            "end what else runs there, or take other nodes; or plan with less: memory.device_gib",
            refuses=not needs.start_anyway,
        )
    elif gpu.total - gpu.free > DIRTY_BYTES:
        yield Problem(
            (rank,),
            found,
            "a GPU that nobody else uses",
            "see nvidia-smi for what else runs there",
            refuses=False,
        )


def _cards(
    leader: Facts, members: tuple[int, ...], uuids: set[str], shared: bool
) -> Iterator[Problem]:
    cards = leader.driver.cards if leader.driver else ()
    used = [card for card in cards if card.uuid in uuids or not uuids]
    for mode in sorted({card.mode for card in used if card.mode in ALONE}):
        if ALONE[mode] < 1 or shared:
            yield Problem(
                members,
                f"GPUs in computing mode {mode}",
                "Default: trainer and rollout servers share them",
                "nvidia-smi -c DEFAULT (the site's administrators)",
            )
    if errors := sum(card.ecc_errors or 0 for card in used):
        yield Problem(
            members,
            f"{errors} uncorrected ECC errors since the GPUs were reset",
            "none",
            "sbatch --exclude this node, and tell the site",
            refuses=False,
        )


def memory_problems(all_of: Findings) -> Iterator[Problem]:
    """The host's memory, and its shared memory."""
    needs = all_of.needs
    if needs is None:
        return
    for rank, facts in all_of.leading.items():
        if (memory := facts.memory) is None:
            continue
        if needs.host is not None and memory.available < needs.host:
            of = "what leaves the GPUs" if needs.device is not None else "the whole plan"
            yield Problem(
                all_of.node_of(rank),
                f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of host memory free",
                f"{needs.host / GIB:.1f} GiB for {of}",
                'more nodes or ranks per model, or memory.offload = "never"',
                refuses=needs.device is not None
                and memory.total < needs.host
                and not needs.start_anyway,
            )
        if memory.shm_free is not None and memory.shm_free < needs.shm:
            yield Problem(
                all_of.node_of(rank),
                f"{memory.shm_free / GIB:.2f} GiB free in /dev/shm",
                f"{needs.shm / GIB:.2f} GiB for what ranks hand each other",
                "a container's --shm-size, or clear what others left there",
                refuses=needs.shm_is_sure,
            )


def disk_problems(all_of: Findings) -> Iterator[Problem]:
    """Room for the checkpoints that are kept, the one being written, and the exported model."""
    needs = all_of.needs
    if needs is None or needs.checkpoint is None:
        return
    for rank, facts in all_of.leading.items():
        if facts.disk is None:
            continue
        wanted = needs.checkpoints * needs.checkpoint + needs.export
        free = facts.disk.free + needs.left_over
        if free >= wanted:
            continue
        kept = "checkpoint.keep = 0 keeps all" if needs.keeps_all else "lower checkpoint.keep"
        yield Problem(
            all_of.node_of(rank),
            f"{free / GIB:.1f} GiB free below run.folder",
            f"{wanted / GIB:.1f} GiB: {needs.checkpoints} checkpoints of "
            f"{needs.checkpoint / GIB:.1f}, and the exported model",
            f"make room, {kept}, or take another run.folder",
            refuses=not needs.keeps_all or free < needs.checkpoint + needs.export,
        )


def limit_problems(all_of: Findings) -> Iterator[Problem]:
    """ulimits."""
    several = len(all_of.nodes) > 1
    for rank, facts in all_of.facts.items():
        if (limits := facts.limits) is None or all_of.needs is None:
            continue
        wanted = all_of.needs.open_files
        if limits.open_files is not None and limits.open_files < wanted:
            yield Problem(
                (rank,),
                f"at most {limits.open_files} open files (ulimit -n)",
                f"{wanted} for connections among {all_of.ranks} ranks",
                "ulimit -n, at the top of the job's script, or the site's LimitNOFILE of slurmd",
                refuses=False,
            )
        if limits.locked_bytes is not None and limits.has_infiniband and several:
            yield Problem(
                (rank,),
                f"at most {limits.locked_bytes / GIB:.3g} GiB of locked memory (ulimit -l)",
                "unlimited, for InfiniBand",
                "ulimit -l unlimited, or the site's LimitMEMLOCK of slurmd",
                refuses=False,
            )


def probe_problems(all_of: Findings) -> Iterator[Problem]:
    """What could not be found out, and ranks that see another configuration."""
    if all_of.needs is not None and all_of.needs.no_room:
        yield Problem(
            tuple(all_of.seats),
            all_of.needs.no_room,
            "a plan that fits, for train asks the same at its door",
            "python tools/plan.py step RUN.toml --ranks N says what would help; "
            "memory.start_anyway = true, if the plan counts too much",
            refuses=not all_of.needs.start_anyway,
        )
    elif all_of.needs is None or all_of.needs.no_plan:
        why = all_of.needs.no_plan if all_of.needs else "the planner did not answer"
        yield Problem(
            tuple(all_of.seats),
            f"no plan: {why}",
            "one, to check memory and disk by",
            "python tools/plan.py step RUN.toml --ranks N says more",
            refuses=False,
        )
    for rank, facts in all_of.facts.items():
        if facts.config_problem:
            found = facts.config_problem.replace("\n", "; ")
            yield Problem((rank,), found, "what rank 0 finds", "paths that all nodes see")
        for name in facts.silent:
            yield Problem(
                all_of.node_of(rank) if name in OF_NODE else (rank,),
                f"no answer about {QUESTIONS[name]}",
                "one within the time",
                "look at that node: a file system or a driver hangs; or raise --seconds",
                refuses=name in HARD,
                late=True,
            )
        for name, error in facts.failed.items():
            yield Problem(
                all_of.node_of(rank) if name in OF_NODE else (rank,),
                error,
                f"an answer about {QUESTIONS[name]}",
                "see that node",
                refuses=name in HARD,
            )
        if facts.ports:
            yield Problem(
                all_of.node_of(rank),
                facts.ports,
                "ports of loopback for the rollout servers",
                "see ss -tlnp and net.ipv4.ip_local_port_range on that node",
            )


QUESTIONS = {
    "versions": "versions",
    "gpu": "its GPU (torch.cuda)",
    "has_gpu_device": "GPUs (/dev)",
    "asks_for_gpus": "the GPU request",
    "limits": "ulimits",
    "driver": "GPUs (nvidia-smi)",
    "memory": "the host's memory",
    "disk": "the disk of run.folder",
    "ports": "ports",
    "sources": "model and data",
    "sglang": "SGLang (rollout.sglang_python)",
}
HARD = ("versions", "gpu", "sources", "sglang", "disk")  # a run would fail there, too
OF_NODE = ("driver", "memory", "disk", "ports", "sources", "sglang")
