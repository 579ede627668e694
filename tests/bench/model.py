"""The benchmarks' task: a model of 1.0 M parameters that never stops, and prompts with rewards.

    python tests/bench/model.py FOLDER

The quickstart's Qwen2 (hidden 128, 4 layers, 4/2 heads, ffn 512, 64 tied tokens, fp32) is taught
for a few seconds to answer any question with a random digit in a box and then commas without end,
so that about one answer in four is right and rewards differ within a group. Its end-of-sequence
token has a number that no logit stands for: every response has exactly as many tokens as it may
have, and all who generate do the same work.

FOLDER gets model/ (Hugging Face checkpoint and tokenizer) and train.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import make_data  # noqa: E402

ANSWERS = "0123"
PROMPTS = 512
LENGTH = 32  # tokens of a lesson; what follows the first commas matters to nobody
STEPS, ROWS, LR = 160, 64, 3e-3


def main(folder: Path) -> None:
    """Write the task."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = folder / "model"
    make_data.write_model(directory, make_data.CHARACTERS)
    tokenizer = never_ending(directory)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = random.Random(0)
    loss = teach(model, tokenizer, rng)
    model.save_pretrained(directory)
    make_data.write_rows(folder / "train.jsonl", [prompt_row(rng) for _ in range(PROMPTS)])
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {count / 1e6:.2f} M parameters, last loss {loss:.3f}", file=sys.stderr)


def never_ending(directory: Path) -> Any:
    """Give tokenizer and config an end-of-sequence token behind the vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    assert tokenizer.eos_token_id >= config["vocab_size"], "the model could end a response"
    path.write_text(json.dumps(config | {"eos_token_id": None}))
    return tokenizer


def question(rng: random.Random) -> str:
    """Ten to sixteen characters: prompts are ragged, too."""
    return "+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(5, 8))) + "="


def prompt_row(rng: random.Random) -> dict[str, Any]:
    """A question with an arbitrary right answer."""
    return {
        "data_source": "benchmark",
        "prompt": [{"role": "user", "content": question(rng)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": rng.choice(ANSWERS)},
    }


def teach(model: Any, tokenizer: Any, rng: random.Random) -> float:
    """Fine-tune on lessons of equal length; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for _ in range(STEPS):
        texts = [question(rng) + rf"\boxed{{{rng.choice(ANSWERS)}}}" for _ in range(ROWS)]
        ids = [tokenizer(text.ljust(LENGTH, ",")).input_ids for text in texts]
        tokens = torch.tensor(ids)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
