"""Seconds from a command until its first training step begins.

    python tests/bench/startup.py FOLDER [--repeat N]

megatron_prime's `train` on one rank and TRL's trainer, on model.py's FOLDER; and, as a measure of
the machine, the bare imports that both need. The file cache is warm if another benchmark ran first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from rloo_step import contestant
from table import faster, seconds

IMPORTS = {
    "torch": "import torch",
    "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "Megatron": "from megatron.core.models.gpt import GPTModel",
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table's row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    known = parser.parse_args(arguments)
    works: dict[str, Callable[[], None]] = {
        name: lambda name=name: until_ready(name, known.folder) for name in ("rloo", "prime", "trl")
    } | {name: lambda code=code: bare(code) for name, code in IMPORTS.items()}
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(known.repeat):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - started)
    took = {name: median(values) for name, values in found.items()}
    bare_imports = ", ".join(f"{name} {seconds(took[name])}" for name in IMPORTS)
    remarks = f"with PRM and reference {seconds(took['prime'])}; imports alone: {bare_imports}"
    faster("start of training, one rank", took["rloo"], took["trl"], "", remarks)


def until_ready(name: str, folder: Path) -> None:
    """Start a contestant, end it when its first step would begin."""
    with contestant(name, folder, ranks=1, overrides=[]) as starting:
        starting.wait_until_ready()


def bare(code: str) -> None:
    """Run a line of Python in a process of its own."""
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
