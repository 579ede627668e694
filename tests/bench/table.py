"""The table that all benchmarks print rows of.

    python tests/bench/table.py

prints its head: the date, the machine, the versions.
"""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "megatron-core", "trl")
COLUMNS = ("what", "ours", "theirs", "ratio", "aim", "remarks")


def head() -> str:
    """What was measured where, and the table's first two lines."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "?")
    lines = [
        f"{date.today()}, {cpu()}, {cores} cores, {threads} threads; Python"
        f" {platform.python_version()}, {versions}; `bash tests/bench/run.sh`",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join(lines)


def cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3g} s"


def faster(what: str, ours: float, theirs: float, aim: str, remarks: str) -> None:
    """A row of two times; the ratio says how many times faster ours is."""
    row(what, seconds(ours), seconds(theirs), f"{theirs / ours:.2f} ×", aim, remarks)


def row(*cells: str) -> None:
    """A row, one cell for each of COLUMNS."""
    assert len(cells) == len(COLUMNS), "a cell for each column"
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    print(head())
