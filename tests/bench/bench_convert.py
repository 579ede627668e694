"""Converting against `shutil.copyfile` and fsync of the same bytes, and the memory it takes.

`python tests/bench/bench_convert.py [--gb 2] [--workers 2] [--folder DIR]`. Copies and conversions
take turns, each in a process of its own, for the machine may be busy; rates are those of the
medians. What is read is in the page cache; what is written is synchronised before the clock stops.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests' / 'weights'}"

MAKE = """
import pathlib, sys, synthetic
config = synthetic.SMALL | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": int(sys.argv[2]),
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
}
synthetic.make(pathlib.Path(sys.argv[1]), config, files=4)
"""
COPY = """
import os, pathlib, shutil, sys
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
for path in source.iterdir():
    shutil.copyfile(path, target / path.name)  # within the kernel
    file = os.open(target / path.name, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
"""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    known = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=known.folder) as name:
        work = Path(name)
        layers = max(round(known.gb * 1e9 / 121e6), 1)  # of 60.8 M parameters
        hf = work / "hf"
        # Not in this process: a child begins with its parent's largest memory.
        subprocess.run([sys.executable, "-c", MAKE, str(hf), str(layers)], check=True)
        nbytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
        tool = [sys.executable, str(ROOT / "tools" / "convert_hf_to_megatron.py")]
        back = [sys.executable, str(ROOT / "tools" / "convert_megatron_to_hf.py")]
        more = ["--workers", str(known.workers), "--max-shard-gb", "0.5"]
        commands = {
            "copy": [sys.executable, "-c", COPY, str(hf), str(work / "copy")],
            "to Megatron": [*tool, "--hf", str(hf), "--out", str(work / "to"), *more],
            "to Hugging Face": [
                *back, "--checkpoint", str(work / "kept"), "--out", str(work / "back"), *more
            ],
        }  # fmt: skip
        subprocess.run([*tool, "--hf", str(hf), "--out", str(work / "kept"), *more], check=True)
        seconds: dict[str, list[float]] = {what: [] for what in commands}
        busy: dict[str, list[float]] = {what: [] for what in commands}
        peaks: dict[str, int] = {}
        for _ in range(known.turns):
            for what, command in commands.items():
                taken, processor, peak = measured(command)
                seconds[what].append(taken)
                busy[what].append(processor)
                peaks[what] = max(peaks.get(what, 0), peak)
                for made in ("copy", "to", "back"):
                    shutil.rmtree(work / made, ignore_errors=True)
        middle = {what: statistics.median(taken) for what, taken in seconds.items()}
        print(f"{nbytes / 1e9:.2f} GB, {layers} layers, {known.workers} workers")
        for what, taken in middle.items():
            share = middle["copy"] / taken
            print(
                f"{what:16} {taken:6.2f} s {nbytes / 1e9 / taken:6.2f} GB/s "
                f"{share:5.0%} of copying, processor {statistics.median(busy[what]):5.2f} s, "
                f"peak {peaks[what] / 2**20:,.0f} MiB"
            )


def measured(command: list[str]) -> tuple[float, float, int]:
    """Seconds, of them on processors (all together), and the largest resident memory in bytes."""
    os.sync()
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    taken = time.perf_counter() - began
    return taken, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
