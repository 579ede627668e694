"""Everything but the weights that makes a Hugging Face directory usable."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def other_files(source_dir: Path, dtype: torch.dtype) -> dict[str, bytes]:
    """The small files of `source_dir` by name; config.json names `dtype`."""
    config = json.loads((source_dir / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5, and before
    config[key] = str(dtype).removeprefix("torch.")
    copied = {
        name: (source_dir / name).read_bytes() for name in _COPIED if (source_dir / name).exists()
    }
    return {"config.json": json.dumps(config, indent=2).encode(), **copied}
