"""A contestant: megatron_prime's own `train`, a step per turn.

    python tests/bench/rloo_ours.py FOLDER rloo|prime [--section.key=value …]

The command is the real one; only its recorder, which is told of each step's figures, waits for the
next turn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from turns import enter, report

TOML = """
[run]
folder = "{run}"
steps = 1000
[model]
hf = "{folder}/model"
[precision]
policy.dtype = "fp32"
prm.dtype = "fp32"
reference.dtype = "fp32"
[data]
train = "{folder}/train.jsonl"
template = "plain"
max_prompt_length = 32
[rollout]
prompts_per_step = 64
group_size = 4
max_response_length = 64
batch_size = 256
[filter] # every prompt trains, as in TRL
min_accuracy = 0.0
max_accuracy = 1.0
[policy]
lr = 1e-5
mini_batch_size = 256
micro_batch_tokens = 4096
[prm]
lr = 1e-5
mini_batch_size = 256
micro_batch_tokens = 4096
[evaluate]
every = 0
[checkpoint]
every = 0
"""
OUTCOME_ONLY = {"rloo": ["--advantage.process_weight=0.0"], "prime": []}


def main(folder: Path, kind: str, overrides: list[str]) -> None:
    """Train until the driver ends the process."""
    enter()
    from megatron_prime.runtime import recorder
    from megatron_prime.types import Metrics

    class TurnTaking(recorder.RunRecorder):
        def log(self, step: int, metrics: Metrics) -> None:
            super().log(step, metrics)
            report(metrics)

    recorder.RunRecorder = TurnTaking  # before build.py takes it from there
    from megatron_prime.__main__ import main as command

    with tempfile.TemporaryDirectory(dir=folder) as run:
        path = Path(run) / "prime.toml"
        path.write_text(TOML.format(run=run, folder=folder))
        sys.exit(command(["train", str(path), *OUTCOME_ONLY[kind], *overrides]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
