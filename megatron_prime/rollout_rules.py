"""Which knobs of sampling, of its engine and of the policy's loss go together; without torch.

A token may be sampled by another policy than the one that the trainer scores it with: by the
engine's numerics, always a little, and by an older version, if partial responses are kept. There
are two remedies. Importance weights of trainer / engine probability are for the first alone; a
clipped ratio that starts from the engine's log-probs is for both, and leaves nothing to weigh.

An SGLang server is split over ranks by itself, whatever `[megatron]` says; it cuts heads and layers
much as Megatron does, but repeats key/value heads where there are fewer than ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_prime.config import RunConfig

FP8_BLOCK = 128  # weights in a row or column that share a scale
OWNED = {  # options of SGLang's servers that are not for `[sglang]`, and who has the say instead
    "model_path": "model.hf",
    "tp_size": "rollout.tensor_parallel_size",
    "dtype": "the precision of the run",
    "device": "whether the trainer runs on GPUs",
    "host": "the engine",
    "port": "the engine, which takes a free one",
    "nccl_port": "the engine, which takes a free one",
    "api_key": "the engine, which makes one for each run",
    "admin_api_key": "the engine, which makes one for each run",
    "load_format": "the engine, which sends the weights",
    "custom_weight_loader": "the engine, which sends the weights",
    "enable_memory_saver": "memory.offload",
    "skip_tokenizer_init": "the engine, which speaks in token ids",
}
UNFIT = {  # and what the engine can't work with
    "dp_size": "the engine, which starts one server per group of ranks",
    "pp_size": "the engine, which splits a server by rollout.tensor_parallel_size alone",
    "nnodes": "the engine, whose servers are on one node",
    "node_rank": "the engine, whose servers are on one node",
    "base_gpu_id": "the engine, which gives each server its ranks' devices",
    "gpu_id_step": "the engine, which gives each server its ranks' devices",
    "quantization": "rollout.fp8_weights",
    "enable_lora": "the engine, which has no plan for adapters",
    "speculative_algorithm": "the engine, which has no plan for a draft model",
    "preferred_sampling_params": "[rollout], for log-probs must be those of the plain softmax",
}
REFUSED = OWNED | UNFIT


def problems(config: RunConfig) -> Iterator[str]:
    """Combinations that would train on something else than was meant, a line each."""
    rollout, policy = config.rollout, config.policy
    if policy.old_logprobs == "rollout" and policy.loss.importance != "none":
        yield (
            f'policy.loss.importance: found "{policy.loss.importance}" with policy.old_logprobs = '
            '"rollout": the ratio that starts from the engine\'s log-probs has these weights in '
            'it already; set one of them to "none" or "trainer"'
        )
    if rollout.keep_partial and policy.old_logprobs != "rollout":
        yield (
            f'policy.old_logprobs: found "{policy.old_logprobs}" with rollout.keep_partial, wanted '
            '"rollout": tokens of older policies need the log-probs that they were sampled with'
        )
    if rollout.keep_partial and not rollout.abort_surplus:
        yield (
            "rollout.keep_partial: found true without rollout.abort_surplus, which is what leaves "
            "responses unfinished; set that to true, too"
        )


def engine_problems(
    config: RunConfig, model: dict[str, Any], world_size: int | None
) -> Iterator[str]:
    """What the engine can't do, a line each; `model`: config.json of `model.hf`, with defaults."""
    knobs, tp = config.rollout, config.rollout.tensor_parallel_size
    if knobs.engine != "sglang":
        unused = {"tensor_parallel_size": tp > 1, "fp8_weights": knobs.fp8_weights}
        for name in (name for name in unused if unused[name]):
            yield (
                f"rollout.{name}: found {str(getattr(knobs, name)).lower()}, which is of SGLang, "
                f'with rollout.engine = "{knobs.engine}"; remove it, or set that to "sglang"'
            )
        return
    for option in sorted(REFUSED.keys() & config.sglang.keys()):
        yield f"sglang.{option}: not for the user to set; {REFUSED[option]} decides on it"
    if knobs.sglang_python is not None and not knobs.sglang_python.is_file():
        yield (
            f"rollout.sglang_python: no file {knobs.sglang_python}; wanted the Python of the "
            "environment that has SGLang"
        )
    if knobs.sync_timeout_s >= config.run.timeout_s:
        yield (
            f"rollout.sync_timeout_s: found {knobs.sync_timeout_s:g}, wanted less than "
            f"run.timeout_s = {config.run.timeout_s:g}, or the other ranks give up waiting before "
            "a hung server is restarted"
        )
    if world_size is not None and world_size % tp:
        yield (
            f"rollout.tensor_parallel_size: found {tp}, which does not divide the run's "
            f"{world_size} ranks"
        )
    heads, kv, ffn = (
        model[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    if heads % tp or ffn % tp or (kv % tp and tp % kv):
        yield (
            f"rollout.tensor_parallel_size: found {tp}, wanted a divisor of num_attention_heads = "
            f"{heads} and intermediate_size = {ffn}, and a divisor or multiple of "
            f"num_key_value_heads = {kv} of model.hf"
        )
    elif knobs.fp8_weights:
        sizes = {
            "hidden_size": model["hidden_size"],
            "num_attention_heads * head_dim": heads // tp * model["head_dim"],
            "num_key_value_heads * head_dim": max(1, kv // tp) * model["head_dim"],
            "intermediate_size": ffn // tp,
        }
        for name, size in sizes.items():
            if size % FP8_BLOCK:
                yield (
                    f"rollout.fp8_weights: {name} of model.hf is {size} on each of "
                    f"rollout.tensor_parallel_size = {tp} ranks, wanted a multiple of {FP8_BLOCK}"
                )
