"""Runs on disk: each is made once, whoever asks for it, and a killed one continues.

A run's folder is named after its arm, its seed and a digest of its whole resolved configuration
(but for where it lies), so arms that several experiments have in common are run once, and a changed
knob is another run. `cost.json` is written when a run is complete, and marks it so; without it the
same command starts `python -m megatron_prime train` again, which continues from its checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import task
from experiments import Arm

from megatron_prime.config import RunConfig
from megatron_prime.config_file import load

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything lies, and what is asked of all runs."""

    out: Path
    overrides: tuple[str, ...] = ()  # for all runs
    sft_overrides: tuple[str, ...] = ()

    @property
    def start(self) -> Path:
        """The fine-tuned model that every run starts from."""
        return self.out / "sft" / "hf"

    @property
    def start_knobs(self) -> tuple[str, ...]:
        """What all runs start from: model and problems."""
        data = self.out / "data"
        return (
            f"--model.hf={self.start}",
            f"--data.train={data / 'train.jsonl'}",
            f"--data.eval={data / 'test.jsonl'}",
        )

    @property
    def offline_prm(self) -> Path:
        """The PRM that was trained on the start model's rollouts (`offline.py`)."""
        return self.out / "offline" / "hf"


@dataclass(frozen=True, slots=True)
class Run:
    """An arm with a seed, and where it lies."""

    arm: Arm
    seed: int
    folder: Path
    knobs: tuple[str, ...]
    config: RunConfig

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return (self.folder / "cost.json").exists()


def run_of(place: Place, arm: Arm, seed: int) -> Run:
    """The run of an arm with a seed; nothing is started."""
    knobs = (
        f"--run.seed={seed}",
        *place.start_knobs,
        *(knob.format(offline_prm=place.offline_prm) for knob in arm.knobs),
        *place.overrides,
    )
    config = load(HERE / "prime.toml", list(knobs))
    resolved = config.model_dump(mode="json")
    del resolved["run"]["folder"]
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]
    folder = place.out / "runs" / f"{arm.name}_seed{seed}_{digest}"
    return Run(arm, seed, folder, knobs, config)


def complete(place: Place, runs: Sequence[Run]) -> None:
    """Make what is missing of `runs`, one after the other; first what they start from."""
    missing = [run for run in runs if not run.done]
    if missing:
        prepare(place)
    for number, run in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {run.folder}", flush=True)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with run.folder.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("  another command is making it; left to that one", flush=True)
                continue
            if not run.done:
                _make(place, run)


def _make(place: Place, run: Run) -> None:
    if "{offline_prm}" in " ".join(run.arm.knobs):
        import offline

        offline.train(place)
    knobs = [f"--run.folder={run.folder}", *run.knobs]
    resumes = (run.folder / "checkpoints").exists()  # then this start's seconds are not all
    started = time.time()
    cpu_s = launch("train", HERE / "prime.toml", knobs, run.folder.with_suffix(".log"))
    cost = {"cpu_s": None if resumes else cpu_s, "seconds": time.time() - started}
    (run.folder / "cost.json").write_text(json.dumps(cost))


def prepare(place: Place) -> None:
    """The task's files and the fine-tuned start, if they are not there."""
    data = place.out / "data"
    if not (data / "test.jsonl").exists():
        task.main(["--out", str(data)])
    settings = data / "task.json"
    settings.write_text(json.dumps(asdict(task.Task())))
    if not (place.start / "config.json").exists():
        knobs = [
            f"--run.folder={place.out / 'sft'}",
            f"--model.hf={data / 'model'}",
            f"--data.train={data / 'train.jsonl'}",
            f"--sft.data={data / 'sft.jsonl'}",
            f"--sft.output={place.start}",
            *place.sft_overrides,
        ]
        launch("sft", HERE / "sft.toml", knobs, place.out / "sft.log")


def launch(command: str, toml: Path, knobs: Sequence[str], log: Path) -> float:
    """Run `python -m megatron_prime` with one rank and one thread; its CPU seconds.

    Raises RuntimeError with the end of its output if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if Path("/sys/class/net/lo").exists():  # ranks of one machine talk over loopback
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a") as output:
        words = [sys.executable, "-m", "megatron_prime", command, str(toml), *knobs]
        code = subprocess.run(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        end = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(words)} ended with {code}; the end of {log}:\n{end}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
