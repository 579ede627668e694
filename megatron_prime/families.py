"""The model families, and what their config.json leaves unsaid; without torch."""

from __future__ import annotations

from typing import Any

# What `weights/names.py` has a map of names for: Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# What transformers takes where config.json is silent; a null in it is an answer.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}


def with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """A config.json of a family in MODEL_TYPES with what it leaves out."""
    whole = {**_DEFAULTS[model["model_type"]], **model}
    heads = whole.get("num_attention_heads")
    if heads and not whole.get("num_key_value_heads"):
        whole["num_key_value_heads"] = heads
    if heads and "hidden_size" in whole and not whole.get("head_dim"):
        whole["head_dim"] = whole["hidden_size"] // heads
    return whole


def max_positions(model: dict[str, Any]) -> int:
    """The longest sequence that the model of this config.json, `with_defaults`, attends to as a
    whole: up to its length a sliding window hides nothing."""
    window = model.get("sliding_window") if model.get("use_sliding_window") else None
    return int(min(model["max_position_embeddings"], window or model["max_position_embeddings"]))
