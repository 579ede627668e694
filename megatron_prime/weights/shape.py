"""The shape of a model, read from the config.json of a Hugging Face checkpoint.

Everything that Megatron, the reshard and the planner need to know about an architecture is in
`ModelShape` (`validate.py` reads config.json before it, without torch). Only what the models of
the family really vary is a field: what would change the mathematics (sliding windows, scaled RoPE)
is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime.config import ConfigError
from megatron_prime.validate import MODEL_TYPES


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU."""

    family: str  # Hugging Face's model_type
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    padded_vocab_size: int  # rows of the embedding over all tensor-parallel ranks
    max_positions: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    tied_embeddings: bool  # the output layer is the embedding

    @classmethod
    def from_hf(cls, hf_dir: Path, tp: int = 1) -> ModelShape:
        """Read `hf_dir`/config.json, for `tp` tensor-parallel ranks.

        Raises ConfigError when the file is absent or describes another family.
        """
        path = hf_dir / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ConfigError(
                f"no {path}; model.hf must be the directory of a Hugging Face checkpoint"
            ) from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}; download it again") from error
        try:
            return _from_config(config, path, tp)
        except KeyError as error:
            raise ConfigError(f"{path} lacks {error}; is it a whole checkpoint?") from error


def padded(vocab_size: int, tp: int) -> int:
    """Rows of an embedding that `tp` ranks share evenly.

    Each rank's share is a multiple of 16, which tensor cores want of a matrix in FP8.
    """
    return -(-vocab_size // (16 * tp)) * 16 * tp


def _from_config(config: dict[str, Any], path: Path, tp: int) -> ModelShape:
    family = config.get("model_type")
    if family not in MODEL_TYPES:
        raise ConfigError(f"{path}: found model_type {family!r}, wanted one of {list(MODEL_TYPES)}")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"{path}: found rope_type {rope_type!r}, wanted plain RoPE (default)")
    if config.get("use_sliding_window"):
        raise ConfigError(
            f"{path}: sliding windows are not supported; set use_sliding_window false"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{path}: found hidden_act {activation!r}, wanted 'silu'")
    heads = config["num_attention_heads"]
    return ModelShape(
        family=family,
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        padded_vocab_size=padded(config["vocab_size"], tp),
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        qkv_bias=True,  # Qwen2 has it always and says so nowhere
        tied_embeddings=config.get("tie_word_embeddings", False),
    )
