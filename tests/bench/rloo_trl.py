"""A contestant: TRL's RLOOTrainer, an optimizer step per turn, with its samples made anew.

    python tests/bench/rloo_trl.py FOLDER [ROWS_PER_FORWARD]

Set up for speed as its user on a CPU would: fp32, no gradient checkpointing, no reference model,
nothing logged but figures. The reward is megatron_prime's own grader.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import enter, report

GENERATED, SAMPLES, TOKENS = 256, 4, 64


def main(folder: Path, rows: int) -> None:
    """Train until the driver ends the process."""
    enter()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from megatron_prime.verify.math_answer import grade

    def reward(completions: list[str], ground_truth: list[str], **_: Any) -> list[float]:
        return [grade(text, truth) for text, truth in zip(completions, ground_truth, strict=True)]

    class TurnTaking(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            report({})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            report({})

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    problems = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": problem["prompt"][0]["content"],
                "ground_truth": problem["reward_model"]["ground_truth"],
            }
            for problem in problems
        ]
    )
    with tempfile.TemporaryDirectory(dir=folder) as output:
        options = RLOOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=GENERATED // (rows * ranks),
            ddp_backend="gloo" if ranks > 1 else None,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            max_steps=1000,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RLOOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
            reward_funcs=reward,
            args=options,
            train_dataset=dataset,
            callbacks=[TurnTaking()],
        )
        trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 64)
