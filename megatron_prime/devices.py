"""From a run's configuration to the scheduler of this rank's device."""

from __future__ import annotations

import torch

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.models.buffers import buffers_of
from megatron_prime.models.policy import MegatronPolicy
from megatron_prime.models.prm import MegatronPrm
from megatron_prime.models.reference import MegatronReference
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.residency import NEEDED, RESIDENT
from megatron_prime.planner.table import at_most, plan_of
from megatron_prime.protocols import Phase
from megatron_prime.runtime.distributed import WorldRanks
from megatron_prime.runtime.ledger import Limits
from megatron_prime.runtime.scheduler import PhaseScheduler


def scheduler_of(
    config: RunConfig,
    ranks: WorldRanks,
    policy: MegatronPolicy,
    prm: MegatronPrm | None,
    reference: MegatronReference | None,
) -> PhaseScheduler:
    """The scheduler, with the models' buffers out of the way of an engine that starts."""
    gpus = PhaseScheduler(limits_of(config, ranks), ranks.device)
    models = {"policy": policy, "prm": prm, "reference": reference}
    for name, model in models.items():
        if model is not None:
            gpus.add(buffers_of(name, model.engine))
    gpus.make_room(Phase.GENERATE)
    return gpus


def limits_of(config: RunConfig, ranks: WorldRanks) -> Limits:
    """What may lie on this rank's device, and when; the same table on all ranks.

    Raises ConfigError where there is no plan, unless nothing limits memory or
    `memory.start_anyway` is set: such a run has no budget, and its bytes are not checked.
    """
    machine = machine_of(config, ranks)
    try:
        table, least = plan_of(config, ranks.world_size, machine)
        everyone = make_plan(config, ranks.world_size, least.machine, table)
    except ConfigError:  # the plan knows less layouts than Megatron
        if machine is not None and not config.memory.start_anyway:
            raise
        return Limits(NEEDED if config.memory.offload == "always" else RESIDENT)
    if machine is None or config.memory.start_anyway:
        budget = None
    else:
        budget = machine.device_bytes - machine.reserve_bytes
    planned = everyone.ranks[ranks.rank].kept
    return Limits(table, budget, planned, at_most(least)[1])


def machine_of(config: RunConfig, ranks: WorldRanks) -> Machine | None:
    """This rank's device; the smallest of all ranks' where they differ. None: no limit."""
    knobs, device = config.memory, ranks.device
    if device.type != "cuda":
        wanted = knobs.device_gib
        return None if wanted is None else Machine(round(wanted * GIB), 0, on_gpu=False)
    total = torch.cuda.get_device_properties(device).total_memory
    smallest = -ranks.largest(-total)
    limit = smallest if knobs.device_gib is None else round(knobs.device_gib * GIB)
    return Machine(min(smallest, limit), round(knobs.reserve_gib * GIB), on_gpu=True)
