"""A tiny random Qwen2, a server's spec for it, and its weights sent as a trainer would."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_prime.rollout.sglang_client import SglangClient
from megatron_prime.rollout.sglang_server import ServerSpec

KEY = "the-key-of-the-run"
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,  # responses end where the test says
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "float32",
}


def tiny_model(folder: Path) -> Qwen2ForCausalLM:
    """In fp32 with weights of a size that matters; the folder gets a config.json, no weights."""
    torch.manual_seed(3)
    made = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1) * 0.7)
    made.config.save_pretrained(folder)
    return made


def spec_of(folder: Path, model_dir: Path, **options: object) -> ServerSpec:
    """A server of the tiny model on the CPU."""
    return ServerSpec(
        **{
            "python": Path(os.environ["SGLANG_PYTHON"]),
            "model_dir": model_dir,
            "tp": 1,
            "devices": None,
            "host": "127.0.0.1",
            "api_key": KEY,
            "dtype": "fp32",
            "folder": folder,
            "start_timeout_s": 400.0,
            **options,
        }
    )


async def send_weights(url: str, model: Qwen2ForCausalLM, tp: int, version: str) -> None:
    """All tensors under their Hugging Face names to every rank, in the pickle itself."""
    named = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    async with SglangClient(url, KEY) as client:
        await client.update_weights(
            [pickle.dumps(named)] * tp, None, version, flush_cache=True, timeout_s=120
        )


def logprobs_of(model: Qwen2ForCausalLM, prompt: list[int], response: tuple[int, ...]) -> list:
    """What `transformers` says of each response token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    rows = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
    return rows[:, 0].tolist()
