"""What the rollout engine keeps on a rank: weights, key/value cache, the buffers of weight syncs.

Key/value cache: what `sglang.max_total_tokens` asks for; else what `sglang.mem_fraction_static`
leaves beside the engine's weights of the memory that is free when the engine starts. On a GPU that
must hold the longest sequence, or there is no plan: SGLang itself ends where weights alone are
more. On a CPU servers are started with a number of tokens instead. The local engine allocates a
cache for `rollout.batch_size` of the longest sequences.
"""

from __future__ import annotations

from math import ceil

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.planner.counts import SGLANG_VOCAB_MULTIPLE, engine_count
from megatron_prime.planner.states import VALUE_BYTES
from megatron_prime.weights.shape import ModelShape

DEFAULT_FRACTION = 0.4  # sglang.mem_fraction_static, as GPU_DEFAULTS in sglang_arguments.py
CPU_TOKENS = 16384  # sglang.max_total_tokens, as CPU_DEFAULTS there
_FP8_VALUE = 1 + 4 / 128**2  # with the scale of its block
_GIB = 2**30


class NoRoomForServers(ConfigError):
    """Servers would find less memory than their weights and one sequence take."""


def engine_tp(config: RunConfig) -> int:
    """Ranks that share one engine."""
    return config.rollout.tensor_parallel_size if config.rollout.engine == "sglang" else 1


def weight_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Of the policy in the engine, on each rank."""
    rollout, value = config.rollout, VALUE_BYTES[config.precision.policy.dtype]
    served = rollout.engine == "sglang"
    held = engine_count(shape, engine_tp(config), SGLANG_VOCAB_MULTIPLE if served else 1)
    in_fp8 = rollout.fp8_weights and served
    return round(held.matrices * (_FP8_VALUE if in_fp8 else value) + held.others * value)


def cache_bytes_per_token(config: RunConfig, shape: ModelShape) -> int:
    """Keys and values of one token in all layers, on each rank."""
    heads = max(1, shape.num_kv_heads // engine_tp(config))
    value = VALUE_BYTES[config.precision.policy.dtype]
    return 2 * shape.num_layers * heads * shape.head_dim * value


def longest_sequence(config: RunConfig) -> int:
    """Tokens of the longest prompt with the longest response."""
    return config.data.max_prompt_length + config.rollout.max_response_length


def sync_buffers(config: RunConfig, shape: ModelShape) -> int:
    """Bytes in which new weights are handed to a server, on each rank."""
    return 2 * min(int(config.rollout.sync_bucket_mib * 2**20), weight_bytes(config, shape))


def kv_tokens(config: RunConfig, shape: ModelShape, free: int, on_gpu: bool) -> int:
    """Tokens of key/value cache that a server has, or the local engine on each rank.

    `free`: bytes of a rank's device when the engine starts, without the reserve. Raises
    NoRoomForServers where that is too little, on a GPU.
    """
    rollout, sglang, longest = config.rollout, config.sglang, longest_sequence(config)
    if rollout.engine == "local":
        return rollout.batch_size * longest
    if (asked := sglang.get("max_total_tokens")) is not None:
        return int(asked)
    if not on_gpu:
        return max(CPU_TOKENS, longest)
    weights, per_token = weight_bytes(config, shape), cache_bytes_per_token(config, shape)
    fraction = float(sglang.get("mem_fraction_static", DEFAULT_FRACTION))
    usable = free - sync_buffers(config, shape)
    tokens = int(fraction * usable - weights) // per_token
    if tokens < longest:
        wanted = weights + longest * per_token
        least = ceil(100 * wanted / usable) / 100 if usable > 0 else 1.0
        raise NoRoomForServers(
            f"sglang.mem_fraction_static: found {fraction:g} of the {max(0, usable) / _GIB:.1f} GiB"
            f" that servers find free on each GPU, wanted {wanted / _GIB:.1f} GiB: weights "
            f"{weights / _GIB:.1f}, keys and values of one sequence of {longest} tokens "
            f"{longest * per_token / _GIB:.1f}; raise "
            + (f"it to {least:.2f} or more, or " if least < 1 else "")
            + f"rollout.tensor_parallel_size (now {rollout.tensor_parallel_size})"
            + (', or set memory.offload = "auto"' if config.memory.offload == "never" else "")
        )
    return tokens


def engine_bytes(config: RunConfig, shape: ModelShape, free: int, on_gpu: bool) -> dict[str, int]:
    """By name; `free` as in `kv_tokens`."""
    if config.debug.rollouts_from is not None:
        return {}  # rollouts are read, there is no engine
    found = {
        "engine.weights": weight_bytes(config, shape),
        "engine.kv_cache": kv_tokens(config, shape, free, on_gpu)
        * cache_bytes_per_token(config, shape),
    }
    if config.rollout.engine == "sglang":
        found["sync.buffers"] = sync_buffers(config, shape)
    return found
