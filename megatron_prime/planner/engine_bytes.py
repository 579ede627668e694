"""What the rollout engine keeps on a rank: weights, key/value cache, the buffers of weight syncs.

Key/value cache: what `sglang.max_total_tokens` asks for; else what `sglang.mem_fraction_static`
leaves beside the engine's weights of the memory that is free when the engine starts, and no less
than the longest sequence. The local engine allocates a cache for
`rollout.batch_size` of the longest sequences.
"""

from __future__ import annotations

from megatron_prime.config import RunConfig
from megatron_prime.planner.counts import engine_count
from megatron_prime.planner.states import VALUE_BYTES
from megatron_prime.weights.shape import ModelShape

DEFAULT_FRACTION = 0.4  # sglang.mem_fraction_static, as GPU_DEFAULTS in sglang_arguments.py
_FP8_VALUE = 1 + 4 / 128**2  # with the scale of its block


def engine_tp(config: RunConfig) -> int:
    """Ranks that share one engine."""
    return config.rollout.tensor_parallel_size if config.rollout.engine == "sglang" else 1


def weight_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Of the policy in the engine, on each rank."""
    rollout, value = config.rollout, VALUE_BYTES[config.precision.policy.dtype]
    held = engine_count(shape, engine_tp(config))
    in_fp8 = rollout.fp8_weights and rollout.engine == "sglang"
    return round(held.matrices * (_FP8_VALUE if in_fp8 else value) + held.others * value)


def cache_bytes_per_token(config: RunConfig, shape: ModelShape) -> int:
    """Keys and values of one token in all layers, on each rank."""
    heads = max(1, shape.num_kv_heads // engine_tp(config))
    value = VALUE_BYTES[config.precision.policy.dtype]
    return 2 * shape.num_layers * heads * shape.head_dim * value


def longest_sequence(config: RunConfig) -> int:
    """Tokens of the longest prompt with the longest response."""
    return config.data.max_prompt_length + config.rollout.max_response_length


def engine_bytes(
    config: RunConfig,
    shape: ModelShape,
    device_bytes: int,
    reserve_bytes: int,
    others: int,
) -> dict[str, int]:
    """By name. `others`: what the trainer keeps on the device when the engine starts."""
    if config.debug.rollouts_from is not None:
        return {}  # rollouts are read, there is no engine
    rollout, sglang = config.rollout, config.sglang
    weights, per_token = weight_bytes(config, shape), cache_bytes_per_token(config, shape)
    longest = longest_sequence(config)
    if rollout.engine == "local":
        cache = rollout.batch_size * longest * per_token
        return {"engine.weights": weights, "engine.kv_cache": cache}
    buffers = 2 * min(int(rollout.sync_bucket_mib * 2**20), weights)
    tokens = sglang.get("max_total_tokens")
    if tokens is None:
        fraction = float(sglang.get("mem_fraction_static", DEFAULT_FRACTION))
        usable = device_bytes - reserve_bytes - others - buffers
        tokens = max(longest, int(fraction * usable - weights) // per_token)
    return {
        "engine.weights": weights,
        "engine.kv_cache": tokens * per_token,
        "sync.buffers": buffers,
    }
