"""From the configuration to the SGLang engine of this rank."""

from __future__ import annotations

import json
import os
import secrets
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megatron_prime.config import ConfigError, ParallelSizes, RunConfig
from megatron_prime.rollout.engine_group import EngineGroup, Membership
from megatron_prime.rollout.local_engine import DTYPES, end_of_sequence_ids
from megatron_prime.rollout.sglang_arguments import ServerSpec, Share
from megatron_prime.rollout.sglang_engine import SglangEngine
from megatron_prime.rollout.weight_sync import LOADER, WeightSync
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.weights.placement import BLOCK, EngineLayout, TrainingLayout
from megatron_prime.weights.plan import ReshardPlan, make_plan
from megatron_prime.weights.reshard import Reshard
from megatron_prime.weights.shape import ModelShape

LOOPBACK = "127.0.0.1"
# Ranks wait here for servers to start and to answer, which have deadlines of their own; a rank that
# is lost is noticed otherwise (run.lost_after_s).
PATIENCE = timedelta(days=7)
CPU_FFN_MULTIPLE = 32  # DEFAULT_MOE_PADDING_SIZE in sglang/srt/configs/update_config.py


def sglang_engine(
    config: RunConfig,
    sizes: ParallelSizes,
    tokenizer: Any,
    device: torch.device,
    local_ranks: int,
    store: Store | None,
    tp_group: dist.ProcessGroup | None,
    share: Share | None = None,
    timeline: Timeline | None = None,
) -> SglangEngine:
    """Start this rank's server, without waiting for it, and plan how it gets its weights.

    `sizes`: how the source of the weights is split; `tp_group`: its tensor-parallel ranks.
    `store`: where the ranks met, None for one process. Raises ConfigError for what SGLang can't do.
    """
    knobs = config.rollout
    member = Membership(dist.get_rank(), dist.get_world_size(), knobs.tensor_parallel_size)
    plan = reshard_plan(config, sizes, member.world_size, local_ranks)
    if knobs.fp8_weights and device.type != "cuda":
        raise ConfigError("rollout.fp8_weights: found no GPU, and SGLang has FP8 only there")
    if device.type == "cpu":
        check_cpu(plan.shape, member.tp)
    objects = dist.new_group(backend="gloo", timeout=PATIENCE)
    _agree(plan, local_ranks, objects)
    name = _name_of(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    spec = _with_share(_spec(config, member, objects), share or Share())
    group = EngineGroup(member, spec, name, objects)
    dtype = DTYPES[config.precision.policy.dtype]
    reshard = Reshard(plan, member.rank, dtype, tp_group)
    return SglangEngine(
        group,
        WeightSync(reshard, device, knobs.sync_timeout_s),
        knobs,
        tokenizer,
        end_of_sequence_ids(tokenizer, config.model.hf),
        store or dist.HashStore(),  # type: ignore[attr-defined]
        timeline,
    )


def reshard_plan(
    config: RunConfig, sizes: ParallelSizes, world_size: int, ranks_per_node: int
) -> ReshardPlan:
    """How a run's weights go from the trainer to its servers; without a process group."""
    knobs = config.rollout
    return make_plan(
        ModelShape.from_hf(config.model.hf, sizes.tp),
        TrainingLayout(sizes, world_size),
        EngineLayout(knobs.tensor_parallel_size, world_size, knobs.fp8_weights),
        DTYPES[config.precision.policy.dtype].itemsize,
        int(knobs.sync_bucket_mib * 2**20),
        ranks_per_node,
    )


def check_cpu(shape: ModelShape, tp: int) -> None:
    """Raise ConfigError for a model that SGLang would pad on a CPU; a plan has no such padding."""
    if shape.num_kv_heads % tp or shape.ffn_size % (CPU_FFN_MULTIPLE * tp):
        raise ConfigError(
            f"rollout.tensor_parallel_size: found {tp} for a model of {shape.num_kv_heads} "
            f"key/value heads and intermediate_size {shape.ffn_size}; on a CPU SGLang wants a "
            f"divisor of the heads and, on each rank, a multiple of {CPU_FFN_MULTIPLE} columns"
        )


def _spec(config: RunConfig, member: Membership, objects: Any) -> ServerSpec:
    knobs, options = config.rollout, dict(config.sglang)
    if knobs.fp8_weights:
        given = options.get("json_model_override_args", "{}")
        override = json.loads(given) if isinstance(given, str) else dict(given)
        override["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
        options["json_model_override_args"] = json.dumps(override)
    key: list[str] = [secrets.token_hex(16)]
    dist.broadcast_object_list(key, src=0, group=objects)  # one for the run
    return ServerSpec(
        python=knobs.sglang_python or Path(sys.executable),
        model_dir=config.model.hf.resolve(),
        tp=member.tp,
        devices=None,  # `EngineGroup` asks the ranks
        host=LOOPBACK,
        api_key=key[0],
        dtype=config.precision.policy.dtype,
        folder=config.run.folder.resolve() / "engines" / str(member.server),
        options=options,
        start_timeout_s=knobs.start_timeout_s,
        weight_loader=LOADER,
    )


def _with_share(spec: ServerSpec, share: Share) -> ServerSpec:
    """Without a number of its own a server would take a share of what it finds free."""
    planned = {} if share.kv_tokens is None else {"max_total_tokens": share.kv_tokens}
    options = planned | dict(spec.options)
    return replace(spec, gives_memory=share.gives_memory, options=options)


def _name_of(device: torch.device, visible: str | None) -> str | None:
    """The GPU as CUDA_VISIBLE_DEVICES names it (`visible`: its value here); None for a CPU.

    Not its UUID: SGLang takes those for no numbers, and then does without its own all-reduce.
    """
    if device.type != "cuda":
        return None
    index = device.index or 0
    return visible.split(",")[index] if visible else str(index)


def _agree(plan: ReshardPlan, ranks_per_node: int, objects: Any) -> None:
    """Raise ConfigError unless all ranks plan with the same numbers."""
    mine = (ranks_per_node, plan.shape, plan.training, plan.engine, len(plan.rounds))
    found: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=objects)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ConfigError(
                f"rank {rank} plans the weight sync for {other}, rank 0 for {found[0]}; start all "
                "ranks with the same configuration and as many on every node"
            )
