"""The shape of a model, read from the config.json of a Hugging Face checkpoint.

Everything that Megatron, the reshard and the planner need to know about an architecture is in
`ModelShape` (`validate.py` reads config.json before it, without torch). Only what the models of
the families really vary is a field; what would change the mathematics (other activations, biases
and scalings of RoPE than those built here) is refused. A sliding window is attention over
everything as long as no sequence is longer than it, so it only bounds the length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prime.config import ConfigError, ModelName, RunConfig
from megatron_prime.families import MODEL_TYPES, max_positions, with_defaults


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
    qk_norm: bool = False  # RMSNorm of each query and key head
    rope_scaling_factor: float | None = None  # of Llama 3.1's RoPE
    value_head: bool = False  # a critic's: one number for each token in place of the vocabulary

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
                f"no {path}; wanted the directory of a Hugging Face checkpoint (of a run: model.hf)"
            ) from error
        except ValueError as error:  # no JSON, no UTF-8
            raise ConfigError(f"{path} is not JSON: {error}; download it again") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: found {type(config).__name__}, wanted a table of settings")
        for key in _WHOLE & config.keys():
            if not isinstance(config[key], int) or config[key] < 1:
                raise ConfigError(f"{path}: found {key} = {config[key]!r}, wanted a whole number")
        try:
            return _from_config(config, path, tp)
        except KeyError as error:
            raise ConfigError(f"{path} lacks {error}; is it a whole checkpoint?") from error

    def as_critic(self) -> ModelShape:
        """The same model with a value head for its output layer, which nothing is tied to."""
        return replace(self, tied_embeddings=False, value_head=True)

    @property
    def output_size(self) -> int:
        """Outputs of the last layer over all tensor-parallel ranks: logits, padded, or a value."""
        return 1 if self.value_head else self.padded_vocab_size


def shape_of(config: RunConfig, name: ModelName) -> ModelShape:
    """The shape of a run's model, as its own checkpoint has it; a critic's with its value head."""
    shape = ModelShape.from_hf(config.hf_of(name), config.parallel.tp)
    return shape.as_critic() if name == "critic" else shape


def padded(vocab_size: int, tp: int) -> int:
    """Rows of an embedding that `tp` ranks share evenly, each a multiple of 16 (for fast kernels).

    A checkpoint may be loaded with another `tp`, and so another padding.
    """
    return -(-vocab_size // (16 * tp)) * 16 * tp


_WHOLE = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
}
# What no model here has: the value that runs, and what another one means.
_REFUSED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "another activation"),
    "attention_bias": (False, "a bias on the attention's output too"),
    "mlp_bias": (False, "biases in the feed-forward layers"),
    "quantization_config": (None, "quantised weights; take the checkpoint in bf16"),
}


def _from_config(config: dict[str, Any], path: Path, tp: int) -> ModelShape:
    family = config.get("model_type")
    if family not in MODEL_TYPES:
        raise ConfigError(f"{path}: found model_type {family!r}, wanted one of {list(MODEL_TYPES)}")
    for key, (wanted, meaning) in _REFUSED.items():
        if (found := config.get(key, wanted)) != wanted:
            raise ConfigError(
                f"{path}: found {key} = {found!r} ({meaning}), wanted {wanted!r}; this model is "
                "not supported"
            )
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = with_defaults(config)
    return ModelShape(
        family=family,
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        padded_vocab_size=padded(config["vocab_size"], tp),
        max_positions=max_positions(config),
        norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        qkv_bias=family == "qwen2",  # always, and config.json says so nowhere
        tied_embeddings=config.get("tie_word_embeddings", False),
        qk_norm=family == "qwen3",
        rope_scaling_factor=_scaling_factor(rope, path),
    )


def _scaling_factor(rope: dict[str, Any], path: Path) -> float | None:
    """None for plain RoPE; the factor of Llama 3.1's, whose other numbers Megatron has built in."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    built_in = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if rope_type != "llama3":
        raise ConfigError(
            f"{path}: found rope_type {rope_type!r}, wanted plain RoPE ('default') or 'llama3'"
        )
    if others := {key: rope.get(key) for key, value in built_in.items() if rope.get(key) != value}:
        raise ConfigError(
            f"{path}: found {others} in its llama3 RoPE, wanted {built_in}, which are built into "
            "Megatron-core"
        )
    return float(rope["factor"])
