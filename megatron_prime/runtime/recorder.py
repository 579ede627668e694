"""Keeps a run's figures and shows them: metrics.jsonl, TensorBoard, the console.

metrics.jsonl is the record: one JSON object per step, `step` first and then the names in order, a
value that is not finite as null. Names have the shape `stage/figure`. A resumed run continues the
file: what was logged after its checkpoint is cut off, so that no step stands twice.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from megatron_prime.errors import RunError
from megatron_prime.protocols import Phase
from megatron_prime.runtime.console import TimeLeft, mismatch_line, open_display, step_line
from megatron_prime.runtime.rollout_files import write_step
from megatron_prime.types import Metrics, VerifiedGroup

_OF_STEPS = ("rollout", "verify", "filter", "prm", "critic", "policy", "time", "memory")
STAGES = (*_OF_STEPS, "evaluate", "eval", "sft", "held_out")


class MetricsError(RunError, ValueError):
    """Figures that can't be recorded, or a metrics.jsonl that can't be continued."""


class RunRecorder:
    """Rank 0 writes and prints; on the other ranks nothing happens."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        rank: int,
        resume_step: int = 0,
        save_rollouts: bool = False,
        mismatch_alarm: float | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Write into `folder`; `resume_step` steps are done already, 0 starts afresh.

        A fresh start moves an older metrics.jsonl to metrics.previous.jsonl and, if it saves its
        rollouts, older ones to rollouts.previous. Raises MetricsError if the file to be continued
        is damaged. `mismatch_alarm`: what is said of a step that `rollout/mismatch_alarm` marks.
        `on_step`: told of each step that is logged, on every rank.
        """
        self._on_step = on_step
        self._mismatch_alarm = mismatch_alarm
        self._last_step = resume_step or -1
        self._total_steps = total_steps
        self._outputs = Outputs(folder, total_steps, resume_step) if rank == 0 else None
        self._rollouts = folder / "rollouts" if save_rollouts and rank == 0 else None
        if self._rollouts and resume_step == 0:
            set_aside(self._rollouts)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record a step's figures; without any, nothing is written.

        Raises MetricsError for an unknown stage or a step that was logged before.
        """
        if unknown := sorted(name for name in metrics if name.partition("/")[0] not in STAGES):
            raise MetricsError(
                f"found metrics {unknown}, wanted names like rollout/accuracy, of one of the "
                f"stages {', '.join(STAGES)}"
            )
        if step <= self._last_step:
            raise MetricsError(
                f"step {step} logged after step {self._last_step}; a resumed run passes "
                "resume_step, the number of steps its checkpoint has done"
            )
        self._last_step = step
        self._on_step(step)
        if self._outputs and metrics:
            self._outputs.log(step, metrics)
            if metrics.get("rollout/mismatch_alarm"):
                assert self._mismatch_alarm is not None, "whoever computes it has the threshold"
                self._outputs.display.say(mismatch_line(step, metrics, self._mismatch_alarm))

    def rollouts(self, step: int, groups: Sequence[VerifiedGroup]) -> None:
        """Keep a step's groups in `rollouts/`, if the run was asked to."""
        if self._rollouts:
            write_step(self._rollouts, step, groups)

    def progress(self, note: str, done: int, total: int) -> None:
        """Show how far the current phase has come; never stored."""
        if self._outputs:
            self._outputs.display.progress(note, done, total)

    def phase(self, phase: Phase) -> None:
        """Show which phase begins."""
        if self._outputs:
            self._outputs.display.phase(phase.value.replace("_", " "))

    def summary(self, curves: Path, exported: Path) -> None:
        """Say where everything lies."""
        if self._outputs:
            self._outputs.summary(curves, exported)

    def close(self) -> None:
        """Close the files and give the terminal back."""
        if self._outputs:
            self._outputs.close()

    def __enter__(self) -> Self:
        """Close at the end of the `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close whatever happened; errors pass."""
        self.close()


class Outputs:
    """The files and the display of rank 0."""

    def __init__(self, folder: Path, total_steps: int, resume_step: int) -> None:
        """Open all; the import of TensorBoard takes a second and is made here, on rank 0 only."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / "metrics.jsonl"
        continue_metrics(self._metrics, resume_step)
        self._lines = self._metrics.open("a")
        self._events = folder / "tensorboard"
        # TensorBoard hides what earlier runs in the folder wrote from this step on.
        purge_step = resume_step + 1 if resume_step else 0
        self._tensorboard = SummaryWriter(str(self._events), purge_step=purge_step)
        self._total_steps = total_steps
        self._time_left = TimeLeft(resume_step, total_steps)
        self.display = open_display(sys.stdout, resume_step, total_steps)

    def log(self, step: int, metrics: Metrics) -> None:
        """One line of JSON, one point per TensorBoard curve, one line on the console."""
        finite = {
            name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())
        }
        self._lines.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        left = self._time_left.after(step)
        self.display.advance(step, left)
        self.display.say(step_line(step, self._total_steps, metrics, left))

    def summary(self, curves: Path, exported: Path) -> None:
        """Accuracy before and after, and where everything lies: a line each."""
        held_out = series(self._metrics, "evaluate/accuracy")
        if held_out:
            before, after = held_out[0], held_out[-1]
            self.display.say(f"accuracy {before:.1%} before, {after:.1%} after (held out, greedy)")
        self.display.say(f"figures  {self._metrics}")
        self.display.say(f"curves   {curves}")
        self.display.say(f"model    {exported}")
        self.display.say(f"look at  tensorboard --logdir {self._events}")

    def close(self) -> None:
        """Close all."""
        self.display.close()
        self._tensorboard.close()
        self._lines.close()


def series(path: Path, name: str) -> list[float]:
    """All values of one figure in a metrics.jsonl, in order of the steps that have it."""
    steps = (json.loads(line) for line in path.read_text().splitlines())
    return [step[name] for step in steps if step.get(name) is not None]


def continue_metrics(path: Path, resume_step: int) -> None:
    """Leave in `path` the lines of the first `resume_step` steps and of step 0.

    0 moves the whole file aside. A last line that was torn by a crash goes, any other damage
    raises MetricsError. The file is replaced in one move, never half written.
    """
    if not path.exists():
        return
    if resume_step == 0:
        path.replace(path.with_name("metrics.previous.jsonl"))
        return
    *complete, _torn = path.read_text().split("\n")  # the last piece is empty if nothing is torn
    kept = [line for line in complete if _step_of(line, path) <= resume_step]
    shorter = path.with_name("metrics.jsonl.part")
    shorter.write_text("".join(f"{line}\n" for line in kept))
    shorter.replace(path)


def set_aside(folder: Path) -> None:
    """Rename `folder`, if there is one, to `<its name>.previous`, in place of one before."""
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        if previous.exists():
            shutil.rmtree(previous)
        folder.rename(previous)


def _step_of(line: str, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise MetricsError(
            f"{path} has a line that is no step: {line[:80]!r}; repair or move the file to resume"
        ) from error
