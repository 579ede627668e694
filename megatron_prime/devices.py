"""From a run's configuration to the scheduler of this rank's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch

from megatron_prime.config import ConfigError, ModelName, RunConfig
from megatron_prime.models.buffers import buffers_of
from megatron_prime.models.critic import MegatronCritic
from megatron_prime.models.factory import critic_of, policy_of, prm_of, reference_of
from megatron_prime.models.policy import MegatronPolicy
from megatron_prime.models.prm import FrozenPrm, MegatronPrm
from megatron_prime.models.reference import MegatronReference
from megatron_prime.models.training import TrainableEngine
from megatron_prime.planner.door import check_fits, check_host, machine_of
from megatron_prime.planner.memory import GIB, make_plan
from megatron_prime.planner.residency import NEEDED, RESIDENT, Table
from megatron_prime.planner.table import at_most, plan_of, planned_tokens
from megatron_prime.runtime.distributed import WorldRanks
from megatron_prime.runtime.host_memory import host_bytes
from megatron_prime.runtime.ledger import Limits
from megatron_prime.runtime.scheduler import PhaseScheduler

_Model = TypeVar(
    "_Model", MegatronPolicy, MegatronPrm | FrozenPrm, MegatronReference, MegatronCritic
)


class Models(NamedTuple):
    """Those that a run has; None: it does without."""

    policy: MegatronPolicy
    prm: MegatronPrm | FrozenPrm | None
    reference: MegatronReference | None
    critic: MegatronCritic | None

    @property
    def saved(self) -> dict[str, TrainableEngine]:
        """What a checkpoint keeps, by name; a frozen PRM is as `prm.hf` has it."""
        trained = {"policy": self.policy, "prm": self.prm, "critic": self.critic}
        return {
            name: model.engine
            for name, model in trained.items()
            if model is not None and isinstance(model.engine, TrainableEngine)
        }


def models_on(gpus: PhaseScheduler, config: RunConfig) -> Models:
    """All models, built one after the other; each is put away before the next.

    So loading needs no more of the device than an update does.
    """

    def made(name: ModelName, make: Callable[[RunConfig], _Model]) -> _Model | None:
        if name not in config.models:
            return None
        model = make(config)
        gpus.add(buffers_of(name, model.engine))
        gpus.make_room()
        return model

    with gpus.starting():
        policy = made("policy", policy_of)
        assert policy is not None, "every run has a policy"
        prm, reference = made("prm", prm_of), made("reference", reference_of)
        return Models(policy, prm, reference, made("critic", critic_of))


def limits_of(config: RunConfig, ranks: WorldRanks, local_ranks: int) -> Limits:
    """What may lie on this rank's device, and when; the same table on all ranks.

    `local_ranks`: how many share this node's memory. Raises ConfigError for a run that can't fit,
    or that can't be planned while memory is limited, unless `memory.start_anyway` is set: such a
    run has no budget, and its bytes are not checked.
    """
    on_gpu, world_size = ranks.device.type == "cuda", ranks.world_size
    found = device_bytes(ranks)
    check_fits(config, world_size, found, on_gpu)
    machine = machine_of(config, found, on_gpu)
    always = config.memory.offload == "always"
    try:
        table, least = plan_of(config, world_size, machine)
        mine = make_plan(config, world_size, least.machine, table).ranks[ranks.rank].kept
    except ConfigError as error:  # the plan knows less layouts than Megatron; nothing depends on it
        tell(ranks, f"memory: no plan, so nothing is checked ({error})")
        return Limits(NEEDED if always else RESIDENT, starts_empty=always)
    if on_gpu:
        check_host(config, least, local_ranks, host_bytes())
    tell(ranks, f"memory: {what_leaves(table, mine)}")
    empty = table is not RESIDENT
    if config.memory.start_anyway:
        return Limits(table, starts_empty=empty)
    budget = None
    if machine is not None:
        fixed = mine.get("sync.buffers", 0)
        budget = machine.device_bytes - machine.reserve_bytes - fixed
    servers = on_gpu and config.rollout.engine == "sglang"
    tokens = planned_tokens(config, least) if servers else None
    return Limits(table, budget, mine, at_most(least)[1], empty, tokens)


def what_leaves(table: Table, kept: Mapping[str, int]) -> str:
    """One line for the start of a run."""
    names = [
        name for name, n in kept.items() if n and any(name not in row for row in table.values())
    ]
    if not names:
        return "everything stays on the device"
    gone = sum(kept[name] for name in names) / GIB
    return f"{', '.join(names)} leave while they are not needed ({gone:.3g} GiB on rank 0)"


def tell(ranks: WorldRanks, line: str) -> None:
    """Say it once."""
    if ranks.rank == 0:
        print(line, flush=True)


def device_bytes(ranks: WorldRanks) -> int | None:
    """What each rank's GPU has, or the smallest of them; None on a CPU."""
    if ranks.device.type != "cuda":
        return None
    return -ranks.largest(-torch.cuda.get_device_properties(ranks.device).total_memory)
