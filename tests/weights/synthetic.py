"""Hugging Face checkpoints of any shape, of random bytes or of none (sparse files)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.raw_safetensors import table_of
from megatron_prime.weights.shape import ModelShape

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA_70B = SMALL | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
QWEN_72B = LLAMA_70B | {
    "model_type": "qwen2",
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
}


def make(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    files: int = 1,
    sparse: bool = False,
) -> Path:
    """Write `folder`: config.json, tokenizer, and safetensors in `files` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"this": name}))
    sizes = hf_shapes(ModelShape.from_hf(folder))
    names = list(sizes)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for i, held in enumerate(_split(names, files), 1):
        file = f"model-{i:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(held, file)
        with (folder / file).open("wb") as out:
            out.write(table_of((name, str(dtype)[6:], sizes[name]) for name in held))
            if sparse:
                out.truncate(out.tell() + sum(prod(sizes[n]) for n in held) * dtype.itemsize)
                continue
            for name in held:
                tensor = torch.randn(sizes[name], generator=generator).to(dtype)
                out.write(tensor.view(-1).view(torch.uint8).numpy())
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _split(names: list[str], parts: int) -> Iterator[list[str]]:
    each = -(-len(names) // parts)
    for start in range(0, len(names), each):
        yield names[start : start + each]
