"""What FP8 products do to log-probs, computed without FP8 hardware: an independent truth.

Inputs and weights of every linear layer of a `transformers` model are rounded to E4M3 with one
scale per tensor, products are fp32. FP8 is a floating format, so finer scales change little where
values are within a few powers of ten of each other: the figure serves for every recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SHAPE = {  # every side of its matrices is a multiple of 128
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def make_checkpoint(folder: Path) -> None:
    """A random Qwen2 whose weights are bf16 values and whose next-token guesses are uneven."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn_like(parameter) * 0.06 + (parameter.dim() == 1) * 1.0
            parameter.copy_(value.bfloat16())
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def rounded(values: torch.Tensor) -> torch.Tensor:
    """`values` after a trip to E4M3, the largest of them at 448."""
    scale = 448.0 / values.abs().amax()
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


@torch.no_grad()
def logprobs(folder: Path, sequences: Sequence[Any], in_fp8: bool) -> torch.Tensor:
    """Log-probs of all response tokens, one row after the other: float32 [tokens]."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if in_fp8:
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight))
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    found = []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        logp = model(ids).logits[0, sequence.prompt_length - 1 : -1].log_softmax(-1)
        found.append(logp.gather(-1, ids[0, sequence.prompt_length :, None])[:, 0])
    return torch.cat(found)
