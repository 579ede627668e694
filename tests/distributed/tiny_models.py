"""Tiny random checkpoints of every family with what `transformers` says of some ragged rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ROWS = 10
CONFIGS: dict[str, dict[str, Any]] = {
    # Qwen2.5: vocabulary not divisible by TP, groups of four query heads, another norm and theta
    "tied": {
        "model_type": "qwen2",
        "vocab_size": 61,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "untied": {
        "model_type": "qwen2",
        "vocab_size": 100,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama2": {
        "model_type": "llama",
        "vocab_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
    "llama3": {  # 3.2: tied, grouped, scaled RoPE
        "model_type": "llama",
        "vocab_size": 67,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {  # heads wider than hidden_size / heads, as in Nemo; a window that hides nothing
        "model_type": "mistral",
        "vocab_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "sliding_window": 48,
        "tie_word_embeddings": False,
    },
    "qwen3": {  # norms of queries and keys, heads wider than hidden_size / heads
        "model_type": "qwen3",
        "vocab_size": 75,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}


def make(folder: Path, ffn_size: int = 96) -> None:
    """Write `folder`/NAME (a checkpoint) and `folder`/NAME.pt: sequences, log-probs, entropies."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for seed, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            hidden_size=64,
            intermediate_size=ffn_size,
            num_hidden_layers=4,
            max_position_embeddings=64,
            **options,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too: not zeros and ones
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1) * 0.7)
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text("{}")
        torch.save(truth_of(model, ragged(config.vocab_size)), folder / f"{name}.pt")


def ragged(vocab_size: int) -> list[tuple[list[int], int]]:
    """Token ids and prompt lengths of rows between 4 and 40 tokens."""
    rows = []
    for i in range(ROWS):
        length, prompt = 4 + (i * 13) % 37, 1 + i % 3
        rows.append((torch.randint(0, vocab_size, (length,)).tolist(), prompt))
    return rows


@torch.no_grad()
def truth_of(model: Any, sequences: list[tuple[list[int], int]]) -> dict[str, Any]:
    """Each row by itself, without padding or packing; [N, T] with zeros beyond the responses."""
    width = max(len(ids) - prompt for ids, prompt in sequences)
    logprobs, entropy = torch.zeros(2, len(sequences), width)
    for i, (ids, prompt) in enumerate(sequences):
        logp_V = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].log_softmax(-1)
        found = logp_V.gather(-1, torch.tensor(ids[prompt:])[:, None])[:, 0]
        logprobs[i, : len(found)] = found
        entropy[i, : len(found)] = -(logp_V.exp() * logp_V).sum(-1)
    return {"sequences": sequences, "logprobs": logprobs, "entropy": entropy}
