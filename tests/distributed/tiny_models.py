"""Tiny random Qwen2 checkpoints with what `transformers` says of some rows."""

from __future__ import annotations

from pathlib import Path

import torch

ROWS, LENGTH = 8, 12
CONFIGS = {
    # vocabulary not divisible by TP, groups of four query heads, another norm_eps and rope_theta
    "tied": {
        "vocab_size": 61,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "untied": {
        "vocab_size": 100,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


def make(folder: Path) -> None:
    """Write `folder`/NAME (a checkpoint) and `folder`/NAME.pt (tokens, log-probs, entropy)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for seed, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            max_position_embeddings=64,
            **options,
        )
        model = Qwen2ForCausalLM(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too: not zeros and ones
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1) * 0.7)
            tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
            logp_V = model(tokens).logits[:, :-1].log_softmax(-1)
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text("{}")
        truth = {
            "tokens": tokens,
            "logprobs": logp_V.gather(-1, tokens[:, 1:, None]).squeeze(-1),
            "entropy": -(logp_V.exp() * logp_V).sum(-1),
        }
        torch.save(truth, folder / f"{name}.pt")
