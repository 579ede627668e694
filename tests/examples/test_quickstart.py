"""The README's first command, with three seeds: it learns, in time, in memory."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]

MINUTES, GIBIBYTES, POINTS = 8, 8, 0.25  # what the quickstart promises, on two cores


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_learns(seed: int, tmp_path: Path) -> None:
    subprocess.run(["bash", "-c", "source tools/venv.sh; use_venv"], check=True)  # not timed
    started, peak = time.monotonic(), 0
    command = ["bash", "examples/quickstart/run.sh", "--seed", str(seed), "--out", str(tmp_path)]
    with (tmp_path / "output.txt").open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while run.poll() is None:
                peak = max(peak, resident_bytes(run.pid))
                time.sleep(2)
        finally:  # Ctrl-C: nothing of it may go on
            if run.poll() is None:
                for process in psutil.Process(run.pid).children(recursive=True):
                    process.kill()
                run.kill()
    seconds = time.monotonic() - started
    text = (tmp_path / "output.txt").read_text()
    assert run.returncode == 0, text
    metrics = (tmp_path / "prime/metrics.jsonl").read_text()
    steps = [json.loads(line) for line in metrics.splitlines()]
    accuracy = [step["evaluate/accuracy"] for step in steps if "evaluate/accuracy" in step]
    gained = f"{accuracy[0]:.3f} → {accuracy[-1]:.3f}"
    print(f"seed {seed}: {gained}, {seconds:.0f} s, {peak / 2**30:.1f} GiB")
    assert accuracy[-1] - accuracy[0] >= POINTS
    assert seconds <= 60 * MINUTES
    assert peak <= GIBIBYTES * 2**30
    for shown in ("before", "after", "curves.png", "tensorboard", "prime/hf", "ask.py"):
        assert shown in text, f"the last lines should tell of {shown}"
    question = text.rsplit("ask it:", 1)[1].strip()
    answer = subprocess.run(["bash", "-c", question], capture_output=True, text=True, check=True)
    assert r"\boxed{" in answer.stdout


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all below it; shared pages count once per process."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended while we looked
            continue
    return total
