"""Everything but the weights that makes a Hugging Face directory usable."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_prime.errors import WeightsError

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",  # Mistral's
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


_CLASSIFIERS = {  # transformers' names
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}

_FOLDER = "additional_chat_templates"  # NAME.jinja, as transformers saves more than one


def other_files(source_dir: Path, dtype: str, critic: bool = False) -> dict[str, bytes]:
    """The small files of `source_dir` by name; config.json names `dtype` ("bfloat16").

    A `critic`'s also says that its head has one number and no words.
    """
    config = json.loads((source_dir / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5, and before
    config[key] = dtype
    if critic:
        config["architectures"] = [_CLASSIFIERS[config["model_type"]]]
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one label
    paths = [source_dir / name for name in _COPIED]
    paths += sorted((source_dir / _FOLDER).glob("*.jinja"))
    copied = {}
    for path in paths:
        if path.exists():
            copied[str(path.relative_to(source_dir))] = path.read_bytes()
        elif path.is_symlink():
            raise WeightsError(f"{path} is a link to nothing; download it again, or remove it")
    return {"config.json": json.dumps(config, indent=2).encode(), **copied}
