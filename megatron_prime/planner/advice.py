"""Which knob would help most: every candidate is planned, and what it would come to is compared.

Each gets a table of its own, as `memory.offload` asks for: what fits may let less leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.engine_bytes import DEFAULT_FRACTION
from megatron_prime.planner.memory import Machine, MemoryPlan
from megatron_prime.planner.table import plan_of

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
_FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, and the peak with it."""

    change: str  # as it would stand in the TOML file
    peak: int
    fits: bool


def advise(config: RunConfig, world_size: int, machine: Machine) -> list[Advice]:
    """Changes that lower the peak, the one that lowers it most first.

    Where servers find no room there is no peak; then all changes that mend that.
    """
    before = _planned(config, world_size, machine)
    found = []
    for change, changed in _candidates(config, machine):
        plan = _planned(changed, world_size, machine)
        if plan is None or changed.policy.mini_batch_size % (
            world_size // changed.parallel.replica
        ):
            continue
        if before is None or plan.peak.device < before.peak.device:
            found.append(Advice(change, plan.peak.device, plan.fits))
    return sorted(found, key=lambda advice: advice.peak)


def _planned(config: RunConfig, world_size: int, machine: Machine) -> MemoryPlan | None:
    """None where the model or the ranks can't be cut so, or servers find no room."""
    try:
        return plan_of(config, world_size, machine)[1]
    except ConfigError:
        return None


def _candidates(config: RunConfig, machine: Machine) -> Iterator[tuple[str, RunConfig]]:
    sizes, megatron, rollout = config.parallel, config.megatron, config.rollout
    for option, now in ((TP, sizes.tp), (PP, sizes.pp)):
        yield f"megatron.{option} = {2 * now}", _megatron(config, {option: 2 * now})
    if sizes.tp > 1 and not megatron.get("sequence_parallel"):
        yield "megatron.sequence_parallel = true", _megatron(config, {"sequence_parallel": True})
    if megatron.get("recompute_granularity") != "full":
        lines = ", ".join(f"megatron.{key} = {_toml(value)}" for key, value in _FULL.items())
        yield lines, _megatron(config, _FULL)
    if machine.on_gpu and not megatron.get("bias_activation_fusion"):
        yield (
            "megatron.bias_activation_fusion = true",
            _megatron(config, {"bias_activation_fusion": True}),
        )
    yield from _smaller_packs(config)
    if rollout.engine == "sglang":
        wider = 2 * rollout.tensor_parallel_size
        yield (
            f"rollout.tensor_parallel_size = {wider}",
            _with(config, "rollout", tensor_parallel_size=wider),
        )
        if "max_total_tokens" not in config.sglang:
            half = config.sglang.get("mem_fraction_static", DEFAULT_FRACTION) / 2
            yield (
                f"sglang.mem_fraction_static = {half:.2f}",
                config.model_copy(
                    update={"sglang": {**config.sglang, "mem_fraction_static": half}}
                ),
            )
    else:
        size = max(1, rollout.batch_size // 2)
        yield f"rollout.batch_size = {size}", _with(config, "rollout", batch_size=size)
    if config.memory.offload == "never":
        yield 'memory.offload = "auto"', _with(config, "memory", offload="auto")


def _smaller_packs(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Packs half as large, but large enough for the longest sequence."""
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    least = -(-longest // config.parallel.cp)
    changed, lines = config, []
    for table in config.models:
        if table == "reference":  # its packs are the PRM's
            continue
        now = getattr(config, table).micro_batch_tokens
        if (tokens := max(least, now // 2)) < now:
            changed = _with(changed, table, micro_batch_tokens=tokens)
            lines.append(f"{table}.micro_batch_tokens = {tokens}")
    if lines:
        yield ", ".join(lines), changed


def _megatron(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    return config.model_copy(update={"megatron": {**config.megatron, **options}})


def _with(config: RunConfig, table: str, **knobs: Any) -> RunConfig:
    return config.model_copy(update={table: getattr(config, table).model_copy(update=knobs)})


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
