"""Configurations of runs of tiny and of public models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from public_models import CONFIGS

from megatron_prime.config import RunConfig

TINY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 301,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def run_config(folder: Path, model: str | None = None, **tables: Any) -> RunConfig:
    """A run of a model of `CONFIGS`, or of a tiny one, with these tables."""
    hf = folder / (model or "tiny")
    hf.mkdir(exist_ok=True)
    (hf / "config.json").write_text(json.dumps(CONFIGS[model] if model else TINY))
    paths = {"run": {"folder": str(folder)}, "model": {"hf": str(hf)}, "data": {"train": "none"}}
    return RunConfig.model_validate({**paths, **tables})


SGLANG_8B = {
    "megatron": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "rollout": {"engine": "sglang", "tensor_parallel_size": 2},
}
"""Llama-3-8B on a node: what the trainer and the engine are split over."""
