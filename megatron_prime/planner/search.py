"""Layouts for a given number of GPUs, the fastest predicted ones that fit first.

All combinations of tensor, pipeline and context parallelism, of the rollout servers' tensor
parallelism, sequence parallelism, recomputation and offloading are tried that `validate.py` lets
pass and that keep tensor parallelism inside a node. All else is as in the TOML file, but that
pipelines have no virtual stages. Neither bytes nor seconds were measured on a GPU: the first few
are worth a try there, their order among each other is not worth much.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_prime.common_rules import CP, PP, TP, VPP
from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.engine_bytes import NoRoomForServers
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import Machine, MemoryPlan
from megatron_prime.planner.rates import Rates
from megatron_prime.planner.residency import Table
from megatron_prime.planner.seconds import StepSeconds, predict
from megatron_prime.planner.table import plan_of
from megatron_prime.validate import check
from megatron_prime.weights.shape import ModelShape

_POWERS = (1, 2, 4, 8)
_ELSEWHERE = ("data.train", "data.eval", "debug.rollouts_from")  # knobs of files
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
_OFFLOAD: tuple[Literal["never", "auto"], ...] = ("never", "auto")


@dataclass(frozen=True, slots=True)
class Layout:
    """One candidate, and what the planner says about it."""

    options: dict[str, Any]  # of the TOML file, by dotted name
    tp: int
    pp: int
    cp: int
    dp: int
    rollout_tp: int
    sequence_parallel: bool
    recompute: str
    offload: str
    device_bytes: int
    fits: bool
    step: StepSeconds


@dataclass(frozen=True, slots=True)
class Search:
    """Layouts that fit, the fastest first; those that don't, the smallest first, if none does."""

    layouts: tuple[Layout, ...]
    tried: int  # valid ones
    fitting: int


def search(
    config: RunConfig, world_size: int, machine: Machine, rates: Rates, expected: Expectations
) -> Search:
    """Try them all. Raises ConfigError if none is valid, or none has room for its servers."""
    fitting, tried = list[Layout](), 0
    smallest: tuple[RunConfig, Table, MemoryPlan] | None = None
    refused: NoRoomForServers | None = None
    for changed in _configs(config, world_size, rates):
        tried += 1
        try:
            table, plan = plan_of(changed, world_size, machine)
        except NoRoomForServers as error:
            refused = error
            continue
        if plan.fits:
            fitting.append(_layout(changed, table, plan, rates, expected))
        elif smallest is None or plan.peak.device < smallest[2].peak.device:
            smallest = changed, table, plan
    if not tried:
        single = problems(_cut(config, 1, 1, 1, 1), world_size)
        raise ConfigError("\n".join([f"no layout for {world_size} ranks is valid", *single]))
    fitting.sort(key=lambda layout: (layout.step.seconds, layout.device_bytes))
    if not fitting and smallest is not None:
        return Search((_layout(*smallest, rates, expected),), tried, 0)
    if not fitting:
        raise NoRoomForServers(f"none of {tried} layouts fits; of the last one: {refused}")
    return Search(tuple(fitting), tried, len(fitting))


def problems(config: RunConfig, world_size: int) -> list[str]:
    """What `train` would refuse, but for data that may be elsewhere: a line each."""
    try:
        check(config, "train", world_size)
    except ConfigError as error:
        lines = str(error).splitlines()
        return [line for line in lines if line.partition(":")[0] not in _ELSEWHERE]
    return []


def _configs(config: RunConfig, world_size: int, rates: Rates) -> Iterator[RunConfig]:
    """Valid ones."""
    layers = ModelShape.from_hf(config.model.hf).num_layers
    stages = [number for number in range(1, layers + 1) if layers % number == 0]
    in_node = [size for size in _POWERS if size <= rates.ranks_per_node]
    engines = in_node if config.rollout.engine == "sglang" else [1]
    for tp, pp, cp in itertools.product(in_node, stages, _POWERS):
        if world_size % (tp * pp * cp):
            continue
        for rollout_tp in engines:
            cut = _cut(config, tp, pp, cp, rollout_tp)
            if problems(cut, world_size):
                continue
            kinds = itertools.product([False, True][: 1 + (tp > 1)], _RECOMPUTE, _OFFLOAD)
            for parallel, recompute, offload in kinds:
                yield _variant(cut, parallel, recompute, offload)


def _layout(
    config: RunConfig, table: Table, plan: MemoryPlan, rates: Rates, expected: Expectations
) -> Layout:
    sizes = config.parallel
    return Layout(
        options=_options(config),
        tp=sizes.tp,
        pp=sizes.pp,
        cp=sizes.cp,
        dp=plan.world_size // sizes.replica,
        rollout_tp=config.rollout.tensor_parallel_size,
        sequence_parallel=bool(config.megatron["sequence_parallel"]),
        recompute=config.megatron.get("recompute_granularity", "none"),
        offload=config.memory.offload,
        device_bytes=plan.peak.device,
        fits=plan.fits,
        step=predict(config, plan, table, rates, expected),
    )


def _cut(config: RunConfig, tp: int, pp: int, cp: int, rollout_tp: int) -> RunConfig:
    kept = {name: value for name, value in config.megatron.items() if name != VPP}
    rollout = config.rollout.model_copy(update={"tensor_parallel_size": rollout_tp})
    return config.model_copy(
        update={"megatron": kept | {TP: tp, PP: pp, CP: cp}, "rollout": rollout}
    )


def _variant(
    config: RunConfig, parallel: bool, recompute: str, offload: Literal["never", "auto"]
) -> RunConfig:
    kept = {k: v for k, v in config.megatron.items() if not k.startswith("recompute_")}
    megatron = kept | {"sequence_parallel": parallel} | _RECOMPUTE[recompute]
    memory = config.memory.model_copy(update={"offload": offload})
    return config.model_copy(update={"megatron": megatron, "memory": memory})


def _options(config: RunConfig) -> dict[str, Any]:
    """What the TOML file would say."""
    names = (TP, PP, CP, "sequence_parallel", *_RECOMPUTE["full"], "recompute_modules")
    found = {f"megatron.{k}": config.megatron[k] for k in names if k in config.megatron}
    return found | {
        "rollout.tensor_parallel_size": config.rollout.tensor_parallel_size,
        "memory.offload": config.memory.offload,
    }
