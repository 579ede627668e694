"""What rank0_step.py is given: a tokenizer, prompts, a server; and a step's predicted seconds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

from slurm_plans import EXAMPLES, model_of, ranks_of  # noqa: E402

from megatron_prime.config import RunConfig  # noqa: E402
from megatron_prime.config_file import load  # noqa: E402
from megatron_prime.planner.door import machine_of  # noqa: E402
from megatron_prime.planner.lengths import Expectations  # noqa: E402
from megatron_prime.planner.memory import GIB  # noqa: E402
from megatron_prime.planner.rates import rates_of  # noqa: E402
from megatron_prime.planner.seconds import StepSeconds, predict  # noqa: E402
from megatron_prime.planner.table import plan_of  # noqa: E402

PROMPT, LONGEST = 1024, 3072  # tokens


def make_tokenizer() -> tuple[Any, str]:
    """A byte-level BPE of this machine's own Python sources, and their text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:120]
    text = "\n".join(source.read_text(errors="ignore") for source in sources)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(), 16000, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer, text


def prompt_rows(path: Path, text: str, count: int) -> None:
    """Math rows whose prompts have more than 1024 tokens; the bench cuts them there."""
    generator = random.Random(2)
    with path.open("w") as file:
        for _ in range(count):
            start = generator.randrange(len(text) - 6000)
            row = {
                "data_source": "synthetic",
                "prompt": [{"role": "user", "content": text[start : start + 5000]}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "42"},
            }
            file.write(json.dumps(row) + "\n")


@contextmanager
def server(tokens: Path, response: int) -> Iterator[str]:
    """Its address."""
    program = [sys.executable, str(Path(__file__).with_name("rank0_server.py"))]
    process = subprocess.Popen(
        [*program, tokens, str(response), str(LONGEST)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def example(name: str, folder: Path) -> tuple[RunConfig, int]:
    """An example's run and its ranks."""
    path = EXAMPLES / name / "prime.toml"
    return load(path, [f"--model.hf={model_of(name, folder)}"]), ranks_of(name)


def predicted(name: str, folder: Path, response: int) -> StepSeconds:
    """An example's step, with the bench's lengths."""
    config, ranks = example(name, folder)
    expected = Expectations.of(config, mean_prompt=PROMPT, mean_response=response)
    rates = rates_of("h100")
    machine = machine_of(config, round(rates.memory_gib * GIB), True)
    assert machine is not None
    table, plan = plan_of(config, ranks, machine)
    return predict(config, plan, table, rates, expected)
