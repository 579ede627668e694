"""config.json of public models, and how many parameters their checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prime.weights.shape import ModelShape

_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN25 = {"model_type": "qwen2", "vocab_size": 152064, "num_key_value_heads": 8}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}


def _sizes(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA3 | _sizes(4096, 32, 32, 14336),
    "Llama-3-70B": _LLAMA3 | _sizes(8192, 80, 64, 28672),
    "Qwen2.5-7B": _QWEN25 | _sizes(3584, 28, 28, 18944) | {"num_key_value_heads": 4},
    "Qwen2.5-32B": _QWEN25 | _sizes(5120, 64, 40, 27648),
    "Qwen2.5-72B": _QWEN25 | _sizes(8192, 80, 64, 29568),
    "Qwen3-8B": _QWEN3 | _sizes(4096, 36, 32, 12288),
    "Qwen3-32B": _QWEN3 | _sizes(5120, 64, 64, 25600),
    "Qwen2.5-0.5B": _QWEN25  # tied
    | _sizes(896, 24, 14, 4864)
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}

PUBLISHED = {  # parameters in the checkpoints on huggingface.co
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen2.5-0.5B": 494_032_768,
}


def shape_of(folder: Path, name: str, tp: int = 1, **changes: Any) -> ModelShape:
    """A model's shape, by way of a config.json in `folder`."""
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
    return ModelShape.from_hf(folder, tp)
