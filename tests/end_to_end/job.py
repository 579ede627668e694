"""A job small enough to run whole: name the digit, by a model that guesses it.

The prompt `0173=` asks for its last digit as `\\boxed{3}`. The model is fine-tuned on answers with
any digit, so that sampling finds the right one now and then and prompts pass the accuracy window.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_prime.config import RunConfig
from megatron_prime.config_file import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from launch import run_ranks  # noqa: E402

DIGITS = "0123"
TRAIN, EVAL, SFT = 200, 12, 640
PARALLEL = """
[megatron]
tensor_model_parallel_size = 2
pipeline_model_parallel_size = 2
"""
TOML = """
[run]
folder = "{folder}/run"
steps = 6
timeout_s = 120
[model]
hf = "{folder}/start"
[precision]
policy.dtype = "fp32"
prm.dtype = "fp32"
reference.dtype = "fp32"
[data]
train = "{folder}/train.jsonl"
eval = "{folder}/eval.jsonl"
template = "plain"
max_prompt_length = 8
[rollout]
prompts_per_step = 8
prompts_per_round = 12
max_response_length = 16
[policy]
lr = 2e-3
warmup_steps = 4
mini_batch_size = 16
micro_batch_tokens = 128
[prm]
lr = 2e-3
warmup_steps = 4
mini_batch_size = 16
micro_batch_tokens = 128
measure_after = true
[evaluate]
every = 3
[checkpoint]
every = 2
[sft]
init = "random"
data = "{folder}/sft.jsonl"
output = "{folder}/start"
steps = 60
lr = 1e-2
warmup_steps = 5
mini_batch_size = 32
micro_batch_tokens = 1024
max_length = 64
"""


@dataclass(frozen=True)
class Job:
    """The job's folder and its commands; every run has a folder of its own below it."""

    folder: Path

    def arguments(self, name: str, *knobs: str) -> list[str]:
        """TOML file and overrides of the run called `name`."""
        return [str(self.folder / "prime.toml"), f"--run.folder={self.run(name)}", *knobs]

    def config(self, name: str, *knobs: str) -> RunConfig:
        path, *overrides = self.arguments(name, *knobs)
        return load(Path(path), overrides)

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name

    def start(self, command: str, ranks: int, name: str, *knobs: str) -> str:
        """Run a command under torchrun; its output. AssertionError with it if it fails."""
        return run_ranks("megatron_prime", ranks, [command, *self.arguments(name, *knobs)])

    def start_alone(self, command: str, name: str, *knobs: str) -> None:
        """Run a command in one process without a launcher."""
        subprocess.run(
            [sys.executable, "-m", "megatron_prime", command, *self.arguments(name, *knobs)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
            check=True,
        )

    def metrics(self, name: str) -> dict[int, dict[str, float]]:
        """What a run logged, by step."""
        lines = (self.run(name) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = {record.pop("step"): record for record in records}
        assert len(steps) == len(records), "a step stands twice"
        return steps


def layout(tp: int, pp: int) -> tuple[str, str]:
    """The overrides that choose a layout."""
    return (
        f"--megatron.tensor_model_parallel_size={tp}",
        f"--megatron.pipeline_model_parallel_size={pp}",
    )


def reproducible(record: dict[str, float]) -> dict[str, float]:
    """The figures of a step that another run of the same command must repeat."""
    return {
        name: value
        for name, value in record.items()
        if not name.startswith(("time/", "memory/")) and name != "rollout/tokens_per_s"
    }


def make_job(folder: Path) -> Job:
    """Write the data and fine-tune the start model, by the real command on two ranks."""
    rng = random.Random(0)
    quickstart = load_quickstart()
    questions = [f"{number:03}{rng.choice(DIGITS)}=" for number in range(TRAIN + EVAL + SFT)]
    train, rest = questions[:TRAIN], questions[TRAIN:]
    quickstart.write_rows(folder / "train.jsonl", map(prompt_row, train))
    quickstart.write_rows(folder / "eval.jsonl", map(prompt_row, rest[:EVAL]))
    sft = (conversation_row(question, rng) for question in rest[EVAL:])
    quickstart.write_rows(folder / "sft.jsonl", sft)
    write_shape(quickstart, folder / "shape")
    (folder / "prime.toml").write_text(TOML.format(folder=folder) + PARALLEL)
    job = Job(folder)
    job.start("sft", 2, "sft", f"--model.hf={folder / 'shape'}", *layout(tp=2, pp=1))
    return job


def prompt_row(question: str) -> dict[str, Any]:
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": question[-2]},
    }


def conversation_row(question: str, rng: random.Random) -> dict[str, Any]:
    """Any digit in the box, and up to three before it, so that responses differ in length."""
    digit = rng.choice(DIGITS)
    answer = f"{digit}," * rng.randrange(4) + rf"\boxed{{{digit}}}"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_shape(quickstart: ModuleType, folder: Path) -> None:
    """The quickstart's tokenizer and a model that is smaller than its."""
    quickstart.write_model(folder, quickstart.CHARACTERS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config |= {"max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))


def load_quickstart() -> ModuleType:
    """examples/quickstart/make_data.py as a module."""
    path = ROOT / "examples" / "quickstart" / "make_data.py"
    spec = importlib.util.spec_from_file_location("make_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
