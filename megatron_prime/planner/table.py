"""From `[memory]` to the table of what lies on the device when."""

from __future__ import annotations

from megatron_prime.config import RunConfig
from megatron_prime.planner.engine_bytes import cache_bytes_per_token
from megatron_prime.planner.memory import WORK, Machine, MemoryPlan, make_plan
from megatron_prime.planner.residency import RESIDENT, Table, choose, needed
from megatron_prime.weights.shape import ModelShape


def plan_of(
    config: RunConfig, world_size: int, machine: Machine | None
) -> tuple[Table, MemoryPlan]:
    """The table that `memory.offload` asks for, and the plan with it, of one rank a stage.

    `machine`: None where nothing limits memory. Raises ConfigError as `make_plan` does.
    """
    unlimited = Machine(device_bytes=2**60, reserve_bytes=0, on_gpu=False)
    limits = machine or unlimited
    enough = needed(scored_share(config) > 0)
    if config.memory.offload == "always":
        table = enough
    elif config.memory.offload == "never" or machine is None or keeps_fp8(config):
        table = RESIDENT
    else:
        least = make_plan(config, world_size, limits, enough, one_per_stage=True)
        kept, work = at_most(least)
        table = choose(kept, work, limits.device_bytes - limits.reserve_bytes, enough)
    return table, make_plan(config, world_size, limits, table, one_per_stage=True)


def planned_tokens(config: RunConfig, plan: MemoryPlan) -> int:
    """Tokens of key/value cache that `plan` gives each SGLang server; the same on all ranks.

    As `max_total_tokens` they hold servers to the plan: alone they would take a share of what they
    find free, which is more than was planned with. A plan without a limit has no useful number.
    """
    per_token = cache_bytes_per_token(config, ModelShape.from_hf(config.model.hf))
    return plan.ranks[0].kept["engine.kv_cache"] // per_token


def scored_share(config: RunConfig) -> float:
    """Of the rows, those whose old log-probs the policy's training forward can't give.

    The first mini-batch trains the weights that scoring would take (models/policy.py). All of them
    where the PRM, which trains before, needs the policy's as its reference.
    """
    if config.policy_is_reference:
        return 1.0
    rows = config.rollout.prompts_per_step * config.rollout.group_size
    return max(0.0, 1 - config.policy.mini_batch_size / rows)


def keeps_fp8(config: RunConfig) -> bool:
    """Whether a model has its weights in FP8 alone, in storages that only its layers can move."""
    return any(config.precision.of(name).fp8_param for name in config.models)


def at_most(plan: MemoryPlan) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each buffer, and of each phase's work, on the rank that has most of it.

    So all ranks move the same buffers at the same moments.
    """
    kept = {name: max(rank.kept[name] for rank in plan.ranks) for name in plan.ranks[0].kept}
    work = {
        phase: max(rank.work.get(name, 0) for rank in plan.ranks for name in names)
        for phase, names in WORK.items()
    }
    return kept, work
