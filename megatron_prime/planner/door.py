"""At a run's door: one that can't fit is refused before it loads any weights."""

from __future__ import annotations

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.advice import advise
from megatron_prime.planner.engine_bytes import NoRoomForServers
from megatron_prime.planner.memory import GIB, Machine, MemoryPlan
from megatron_prime.planner.report import advice_lines, short_table
from megatron_prime.planner.residency import Table
from megatron_prime.planner.table import plan_of


def machine_of(config: RunConfig, device_bytes: int | None, on_gpu: bool) -> Machine | None:
    """The memory to plan with: `memory.device_gib`, if a device has as much; None: no limit.

    `device_bytes`: what it has, None where nothing limits it (a CPU). The reserve is for what GPUs
    need beside tensors; a CPU needs none.
    """
    knobs = config.memory
    given = None if knobs.device_gib is None else round(knobs.device_gib * GIB)
    limits = [limit for limit in (device_bytes, given) if limit is not None]
    if not limits:
        return None
    return Machine(min(limits), round(knobs.reserve_gib * GIB) if on_gpu else 0, on_gpu)


def plan_or_advice(
    config: RunConfig, world_size: int, machine: Machine
) -> tuple[Table, MemoryPlan]:
    """`plan_of`, whose ConfigError also says what would help where servers find no room."""
    try:
        return plan_of(config, world_size, machine)
    except NoRoomForServers as error:
        advice = advice_lines(advise(config, world_size, machine))
        raise NoRoomForServers("\n".join([str(error), *advice])) from None


def check_host(config: RunConfig, plan: MemoryPlan, local_ranks: int, host_bytes: int) -> None:
    """Raise ConfigError when what leaves the devices has no room on the host.

    `local_ranks`: on a node of `host_bytes`. Nothing is refused with `memory.start_anyway`.
    """
    needed = plan.host_bytes * local_ranks
    if needed > host_bytes and not config.memory.start_anyway:
        raise ConfigError(
            f"found {host_bytes / GIB:.1f} GiB of host memory for {local_ranks} ranks, wanted "
            f"{needed / GIB:.1f} GiB for what leaves their devices; use more nodes or ranks per "
            'model, or memory.offload = "never"; memory.start_anyway = true tries all the same'
        )


def check_fits(config: RunConfig, world_size: int, device_bytes: int | None, on_gpu: bool) -> None:
    """Raise ConfigError, with who needs how much and what would help, when `train` can't fit.

    `device_bytes` as for `machine_of`. Nothing is refused with `memory.start_anyway`.
    """
    machine = machine_of(config, device_bytes, on_gpu)
    if machine is None or config.memory.start_anyway:
        return
    try:
        _, plan = plan_or_advice(config, world_size, machine)
    except NoRoomForServers as error:
        refusal = str(error)
    else:
        if plan.fits:
            return
        refusal = short_table(plan, advise(config, world_size, machine))
    raise ConfigError(
        f"{refusal}\n"
        "or set memory.start_anyway = true, if the plan counts too much (docs/planner.md)"
    )
