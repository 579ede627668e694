"""Who is who: process groups, seeds, and the one collective of the loop.

One process per device. torchrun or srun start them and say through environment variables how many
there are (`rendezvous.py` reads those, for only `__main__` touches the environment); `initialize`
makes the groups. Ranks are numbered as Megatron does: tensor-parallel neighbours first, then
context-parallel ones, data-parallel replicas, pipeline stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.distributed_c10d import Store

from megatron_prime.algorithm.filtering import passes
from megatron_prime.config import ConfigError, FilterSection, ParallelSizes
from megatron_prime.protocols import Tally
from megatron_prime.runtime.compat import install_cpu_shim
from megatron_prime.runtime.rendezvous import Rendezvous
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Prompt, VerifiedGroup

Shared = TypeVar("Shared")


def initialize(
    rendezvous: Rendezvous,
    sizes: ParallelSizes,
    seed: int,
    timeout_s: float,
    store: Store | None = None,
) -> None:
    """Make the process group (gloo on CPU, NCCL on GPU) and Megatron's groups; seed both.

    The ranks meet in `store`, or, without one, at the address of `rendezvous`.
    `timeout_s` is how long a collective may wait for a lost rank. Pipeline stages get different
    seeds, replicas the same one. Raises ConfigError, before any group is made, when a replica's
    size does not divide the number of processes.
    """
    world = rendezvous.world_size
    tp, pp, cp = sizes.tp, sizes.pp, sizes.cp
    if min(tp, pp, cp, sizes.vpp) < 1 or world % sizes.replica:
        raise ConfigError(
            f"found {world} processes, wanted a multiple of megatron.tensor_model_parallel_size "
            "* megatron.pipeline_model_parallel_size * megatron.context_parallel_size = "
            f"{tp} * {pp} * {cp}; start more processes or lower one of them"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rendezvous.local_rank % torch.cuda.device_count())
    else:
        install_cpu_shim()
    address = f"tcp://{rendezvous.master_addr}:{rendezvous.master_port}"
    if world == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=None if store else address,
        store=store,
        rank=rendezvous.rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    initialize_model_parallel(sizes, seed, timeout_s)


def initialize_model_parallel(sizes: ParallelSizes, seed: int, timeout_s: float) -> None:
    """Megatron's groups and seeds only, on an existing process group (see `initialize`)."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        distributed_timeout_minutes=timeout_s / 60,
    )
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def destroy() -> None:
    """Give back all groups; safe to call when there are none."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class StoreTally:
    """The `Tally` role: a number in the store that all ranks reach."""

    def __init__(self, store: Store, key: str, goal: int, window: FilterSection) -> None:
        self._store, self._key, self._goal, self._window = store, key, goal, window

    def add(self, group: VerifiedGroup) -> None:
        """Count the group if it passes the accuracy window."""
        if passes(group, self._window):
            self._store.add(self._key, 1)

    def reached(self) -> bool:
        """Whether all ranks together have come to the goal."""
        return int(self._store.add(self._key, 0)) >= self._goal


class WorldRanks:
    """The `Ranks` role: which process this is, and gathering from all the others."""

    def __init__(self, timeout_s: float, store: Store | None = None) -> None:
        """`store`: where the ranks count together; one process alone needs none.

        `timeline` is this rank's: it is told when all have met, and gets all ranks' seconds.
        """
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = torch.device(torch.cuda.current_device())  # the shim's is the CPU
        # Objects and flags are on the host: gloo, also beside NCCL.
        self._objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._store = store
        if store is None and self.world_size == 1:
            self._store = dist.HashStore()  # type: ignore[attr-defined]
        self._tallies = 0
        self.timeline = Timeline()

    def tally(self, goal: int, window: FilterSection) -> StoreTally:
        """A count from 0 to `goal` of groups that pass; all ranks ask for it, in the same order."""
        assert self._store is not None, "several ranks count together in the store they met in"
        self._tallies += 1  # a key that no earlier count has used
        return StoreTally(self._store, f"tally_{self._tallies}", goal, window)

    def gather(
        self,
        groups: Sequence[VerifiedGroup],
        prompts: Sequence[Prompt],
        enough: Tally | None = None,
    ) -> list[VerifiedGroup]:
        """All ranks' groups, the same list everywhere, in the order of `prompts`.

        Raises RuntimeError if they are not one group per prompt; without those that are missing
        only if `enough` is reached.
        """
        dist.barrier(self._objects)  # the waiting is over before the copying begins
        mine = (list(groups), self.timeline.met())
        per_rank = [mine] * self.world_size
        dist.all_gather_object(per_rank, mine, group=self._objects)
        self.timeline.count([seconds for _, seconds in per_rank])
        gathered = [group for part, _ in per_rank for group in part]
        found = {group.prompt.prompt_id: group for group in gathered}
        wanted = [prompt.prompt_id for prompt in prompts]
        count = len(gathered)
        # Nobody adds to the tally any more: what it says now is the same on all ranks.
        may_miss = enough is not None and enough.reached()
        if (
            len(found) != count
            or found.keys() - set(wanted)
            or not (may_miss or count == len(wanted))
        ):
            raise RuntimeError(
                f"gathered {count} groups of {len(found)} prompts for {len(wanted)} prompts: the "
                "ranks of the rollout engine must answer each prompt once"
            )
        return [found[prompt_id] for prompt_id in wanted if prompt_id in found]

    def share(self, value: Shared) -> Shared:
        """Rank 0's `value`, on every rank; collective."""
        shared = [value]
        dist.broadcast_object_list(shared, src=0, group=self._objects)
        return shared[0]

    def largest(self, number: int) -> int:
        """The largest `number` of all ranks."""
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._objects)
        return int(shared)
