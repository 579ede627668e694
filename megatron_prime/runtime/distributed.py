"""Who is who: process groups, seeds, and the one collective of the loop.

One process per device. torchrun or srun start them and say through environment variables how many
there are (`rendezvous.py` reads those, for only `__main__` touches the environment); `initialize`
makes the groups. Ranks are numbered as Megatron does: tensor-parallel neighbours first, then
data-parallel replicas, then pipeline stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from megatron_prime.config import ConfigError
from megatron_prime.runtime.compat import install_cpu_shim
from megatron_prime.runtime.rendezvous import Rendezvous
from megatron_prime.types import VerifiedGroup


def initialize(rendezvous: Rendezvous, tp: int, pp: int, seed: int, timeout_s: float) -> None:
    """Make the process group (gloo on CPU, NCCL on GPU) and Megatron's groups; seed both.

    `timeout_s` is how long a collective may wait for a lost rank. Pipeline stages get different
    seeds, replicas the same one. Raises ConfigError, before any group is made, when tp * pp does
    not divide the number of processes.
    """
    world = rendezvous.world_size
    if tp < 1 or pp < 1 or world % (tp * pp):
        raise ConfigError(
            f"found {world} processes, wanted a multiple of megatron.tensor_model_parallel_size "
            f"* megatron.pipeline_model_parallel_size = {tp} * {pp}; start more processes or lower "
            "one of them"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rendezvous.local_rank % torch.cuda.device_count())
    else:
        install_cpu_shim()
    address = f"tcp://{rendezvous.master_addr}:{rendezvous.master_port}"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=address if world > 1 else None,
        store=HashStore() if world == 1 else None,
        rank=rendezvous.rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    initialize_model_parallel(tp, pp, seed, timeout_s)


def initialize_model_parallel(tp: int, pp: int, seed: int, timeout_s: float) -> None:
    """Megatron's groups and seeds only, on an existing process group (see `initialize`)."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
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


class WorldRanks:
    """The `Ranks` role: where this process stands, and gathering from all the others."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.device = torch.device(torch.cuda.current_device())  # the shim's is the CPU
        self.world_size = dist.get_world_size()
        self.dp_rank: int = parallel_state.get_data_parallel_rank()
        self.dp_size: int = parallel_state.get_data_parallel_world_size()
        self.tp_rank: int = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size: int = parallel_state.get_tensor_model_parallel_world_size()
        self.pp_rank: int = parallel_state.get_pipeline_model_parallel_rank()
        self.pp_size: int = parallel_state.get_pipeline_model_parallel_world_size()
        self.is_first_stage: bool = parallel_state.is_pipeline_first_stage()
        self.is_last_stage: bool = parallel_state.is_pipeline_last_stage()
        self._objects = dist.new_group(backend="gloo")

    def gather(self, groups: Sequence[VerifiedGroup]) -> list[VerifiedGroup]:
        """All ranks' groups, the same list everywhere, by prompt_id (equal ones by rank)."""
        per_rank: list[list[VerifiedGroup]] = [[]] * self.world_size
        dist.all_gather_object(per_rank, list(groups), group=self._objects)
        everyone = [group for groups_of_rank in per_rank for group in groups_of_rank]
        return sorted(everyone, key=lambda group: group.prompt.prompt_id)
