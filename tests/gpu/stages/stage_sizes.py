"""What the stages run: model shapes with random weights, and a run's configuration around them.

`1.5B` and `7B` are Qwen2.5's, at their full width; layers are as many as a stage asks for. A 7B
model's two trained copies would need more host memory than a machine of one GPU may have, and a
layer is like any other: figures per FLOP and per byte are not changed by their number, and each row
says how many there were. `tiny` is for a CPU.

Weights are drawn where they are used and written as a Hugging Face checkpoint, for that is what a
run starts from; the tokenizer is the quickstart's, whose end-of-sequence token is beyond all logits
that matter, so that responses are as long as they may be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from model import never_ending, question
from safetensors.torch import save_file
from stage_report import Stage

from megatron_prime.config import RunConfig
from megatron_prime.planner.rates import GPUS, Rates
from megatron_prime.types import Prompt, RolloutBatch, TokenSequence
from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.shape import ModelShape

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": False,
    },
}
SPREAD = 0.02  # standard deviation of random weights
MODELS = ("policy", "prm", "reference")
LOOK = """
import json
from importlib.util import find_spec
from pathlib import Path
found = {name: find_spec(name) is not None for name in ("sglang", "sgl_kernel", "flashinfer")}
kernels = find_spec("sgl_kernel")
folder = Path(kernels.origin).parent if kernels and kernels.origin else None
found["flash_ops"] = bool(folder and list(folder.glob("flash_ops*")))
print(json.dumps(found))
"""


def shapes_of(stage: Stage) -> list[tuple[str, int]]:
    """Shape and layers of each size that memory and speed are measured at."""
    if stage.small:
        return [("tiny", 2)]
    return [("1.5B", 28), ("7B", 6 if stage.short else 8)]


def model_folder(stage: Stage, name: str, layers: int) -> Path:
    """A checkpoint of that shape, made when it is asked for first."""
    folder = stage.scratch / f"{name}_{layers}"
    if (folder / "model.safetensors").exists():
        return folder
    from make_data import CHARACTERS, write_model

    write_model(folder, CHARACTERS)
    never_ending(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {**SHAPES[name], "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    config |= {"max_position_embeddings": 32768, "rope_theta": 1e6, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(ModelShape.from_hf(folder), folder / "model.safetensors")
    return folder


def write_weights(shape: ModelShape, file: Path) -> None:
    """Random bf16 values; norms begin at one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, size in hf_shapes(shape).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        values = torch.randn(size, generator=generator, device=device) * SPREAD
        tensors[name] = values.bfloat16().cpu()
    draft = file.with_suffix(".new")
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(file)


def dtype_of(stage: Stage) -> str:
    """What the stages compute in: on a CPU SGLang and the trainer agree in fp32 only."""
    return "bf16" if stage.on_gpu else "fp32"


def config_of(stage: Stage, model: Path, name: str, **tables: Mapping[str, Any]) -> RunConfig:
    """A run of `model` in the folder `name`; `tables` are added to what is here."""
    found: dict[str, dict[str, Any]] = {
        "run": {"folder": stage.scratch / name, "steps": 1000},
        "model": {"hf": model},
        "precision": {one: {"dtype": dtype_of(stage)} for one in MODELS},
        "data": {"train": stage.scratch / "train.jsonl", "template": "plain"},
        "policy": {"lr": 1e-6},
        "prm": {"lr": 1e-6},
        "rollout": {"engine": "sglang", "sglang_python": sglang_python()},
        "sglang": sglang_options(),
    }
    for key, table in tables.items():
        found[key] = found.get(key, {}) | dict(table)
    return RunConfig.model_validate(found)


def sglang_python() -> Path:
    """The interpreter that has SGLang."""
    return Path(os.environ.get("SGLANG_PYTHON") or sys.executable)


@lru_cache
def sglang_has() -> Mapping[str, bool]:
    """Which of the packages and kernels that matter its interpreter finds; none if it can't run."""
    try:
        said = subprocess.run(
            [str(sglang_python()), "-c", LOOK], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(json.loads(said))


def sglang_missing() -> str | None:
    """Why there is no server, or None."""
    if sglang_has().get("sglang"):
        return None
    return f"{sglang_python()} has no SGLang; SGLANG_PYTHON names another interpreter"


def sglang_options() -> dict[str, Any]:
    """What a server needs where kernels were trimmed (trim_wheel.py) or flashinfer is absent."""
    if not torch.cuda.is_available():
        return {}
    options: dict[str, Any] = {"cuda_graph_max_bs_decode": 64}
    if not sglang_has().get("flash_ops"):
        options["attention_backend"] = "triton"
    if not sglang_has().get("flashinfer"):
        options["sampling_backend"] = "pytorch"
    return options


def chip_rates() -> Rates | None:
    """The data sheet of the GPU that is here, if the planner has it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((rates for chip, rates in GPUS.items() if chip in name), None)


def prompts(tokenizer: Any, count: int) -> list[Prompt]:
    """Questions of the benchmarks' task."""
    import random

    rng = random.Random(0)
    texts = [question(rng) for _ in range(count)]
    return [
        Prompt(number, tuple(tokenizer(text).input_ids), "1", "math", "gpu")
        for number, text in enumerate(texts)
    ]


def rows_of(shape: ModelShape, rows: int, prompt: int, response: int, group: int) -> RolloutBatch:
    """Random tokens, all rows but every fourth as long as they may be; half of them were right."""
    generator = torch.Generator().manual_seed(0)
    lengths = [response if row % 4 else max(1, response // 2) for row in range(rows)]
    sequences = tuple(
        TokenSequence(
            tuple(torch.randint(shape.vocab_size, (prompt + n,), generator=generator).tolist()),
            prompt,
        )
        for n in lengths
    )
    mask = torch.arange(response) < torch.tensor(lengths)[:, None]
    rewards = torch.arange(rows).remainder(2).float()
    return RolloutBatch(sequences, group, mask, rewards, torch.zeros(mask.shape))
