"""The project's own commands on a job, in processes of their own, one rank each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ONE_RANK = ("--megatron.tensor_model_parallel_size=1", "--megatron.pipeline_model_parallel_size=1")

EVERY_PROMPT = ("--filter.min_accuracy=0.0", "--filter.max_accuracy=1.0")
FEW_PROMPTS = (  # of the quickstart's PRIME stage
    "--rollout.prompts_per_step=4",
    "--rollout.prompts_per_round=4",
    "--rollout.max_response_length=16",
    "--policy.mini_batch_size=16",
    "--prm.mini_batch_size=16",
)


def command(name: str, toml: Path, *knobs: str) -> list[str]:
    """To start one."""
    return [sys.executable, "-m", "megatron_prime", name, str(toml), *knobs]


def run(*commands: list[str], log: Path, limit_s: float | None) -> None:
    """All at once, each to its end. RuntimeError with the log's last lines if one fails."""
    with log.open("a") as output:
        processes = [
            subprocess.Popen(
                one, cwd=ROOT, env=dict(os.environ), stdout=output, stderr=subprocess.STDOUT
            )
            for one in commands
        ]
        try:
            codes = [process.wait(limit_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        tail = log.read_text().strip().splitlines()[-5:]
        raise RuntimeError(f"exit codes {codes}: {' / '.join(reversed(tail))}")


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What a run has logged, by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record for record in records}


def make_quickstart(folder: Path, *sizes: str) -> None:
    """The quickstart's data and model shape."""
    if not (folder / "test.jsonl").exists():
        script = ROOT / "examples" / "quickstart" / "make_data.py"
        subprocess.run(
            [sys.executable, str(script), "--out", str(folder), *sizes],
            cwd=ROOT,
            stdout=sys.stderr,
            check=True,
        )
