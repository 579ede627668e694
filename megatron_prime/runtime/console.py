"""What a person sees while a run goes on: one line per step, and on a terminal a live bar below.

The line has the few figures that tell whether a run is well; all others are in TensorBoard and in
metrics.jsonl. A log file (stdout is no terminal) gets the lines alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import IO, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn


class Headline(NamedTuple):
    """A figure of the step line."""

    metric: str
    shown: str


HEADLINES = (
    Headline("sft/loss", "loss {:.4f}"),
    Headline("rollout/accuracy", "accuracy {:.3f}"),
    Headline("evaluate/accuracy", "held out {:.3f}"),
    Headline("policy/outcome_return_mean", "outcome {:.3f}"),
    Headline("prm/process_return_mean", "process {:+.3f}"),
    Headline("prm/pair_accuracy_before", "PRM pairs {:.2f}"),
    Headline("held_out/loss", "held-out loss {:.4f}"),
    Headline("held_out/pair_accuracy", "held-out pairs {:.2f}"),
    Headline("rollout/response_length_mean", "length {:.0f}"),
    Headline("rollout/tokens_per_s", "{:,.0f} tokens/s"),
    Headline("sft/tokens_per_s", "{:,.0f} tokens/s"),
    Headline("time/step_s", "{:.1f} s"),
)


def step_line(step: int, total_steps: int, metrics: Mapping[str, float], left: str) -> str:
    """One step in one line: its number, the headlines that `metrics` has, the time left."""
    figures = [shown.format(metrics[metric]) for metric, shown in HEADLINES if metric in metrics]
    count = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    return "  ".join([count, *figures, left]).rstrip()


def mismatch_line(step: int, metrics: Mapping[str, float], threshold: float) -> str:
    """What to say of a step whose rollouts the trainer gives other probabilities than the engine
    had sampled them with."""
    return (
        f"warning: step {step}: rollout/mismatch_kl is {metrics['rollout/mismatch_kl']:.3g} nats "
        f"per token, above rollout.mismatch_alarm = {threshold:g}: the engine samples from another "
        "policy than is trained. Look at its curve (a jump: the last weight sync; a slow rise: "
        "numerics), at rollout/mismatch_max, and at the number formats of [precision.policy] and "
        "of the engine; policy.loss.importance weighs a small one out"
    )


class TimeLeft:
    """Estimates the rest of a run from its last 20 steps."""

    def __init__(self, step: int, total_steps: int) -> None:
        """`step` is done now, at the time of the call."""
        self._total_steps = total_steps
        self._marks = deque([(step, time.monotonic())], maxlen=21)

    def after(self, step: int) -> str:
        """`0:12:30 left`, said when `step` is done; empty before the first step and at the end."""
        self._marks.append((step, time.monotonic()))
        (first, started), (last, ended) = self._marks[0], self._marks[-1]
        if last == first or last >= self._total_steps:
            return ""
        seconds = (ended - started) / (last - first) * (self._total_steps - last)
        return f"{timedelta(seconds=round(seconds))} left"


class Display(Protocol):
    """Where a run shows itself."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def phase(self, name: str) -> None:
        """What the devices are busy with."""

    def progress(self, note: str, done: int, total: int) -> None:
        """How far the phase has come."""

    def advance(self, step: int, left: str) -> None:
        """`step` is done."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LogDisplay:
    """Lines only, for files and pipes."""

    def __init__(self, stream: IO[str]) -> None:
        """Write to `stream`."""
        self._stream = stream

    def say(self, line: str) -> None:
        """A line that stays."""
        print(line, file=self._stream, flush=True)

    def phase(self, name: str) -> None:
        """Not shown."""

    def progress(self, note: str, done: int, total: int) -> None:
        """Not shown."""

    def advance(self, step: int, left: str) -> None:
        """Not shown."""

    def close(self) -> None:
        """Nothing to put back."""


class LiveDisplay:
    """Lines, and below them a bar with step, phase, progress within it and time left."""

    def __init__(self, stream: IO[str], step: int, total_steps: int) -> None:
        """Start the bar at `step` of `total_steps`."""
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", style="bold"),
            TextColumn("{task.fields[note]}"),
            console=Console(file=stream),
            transient=True,
        )
        self._task = self._bar.add_task(
            "starting", completed=step, total=total_steps, left="", note=""
        )
        self._bar.start()

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def phase(self, name: str) -> None:
        """What the devices are busy with."""
        self._bar.update(self._task, description=name, note="")

    def progress(self, note: str, done: int, total: int) -> None:
        """How far the phase has come."""
        self._bar.update(self._task, note=f"{done}/{total} {note}")

    def advance(self, step: int, left: str) -> None:
        """Move the bar to `step`."""
        self._bar.update(self._task, completed=step, left=left)

    def close(self) -> None:
        """Take the bar away; the lines stay."""
        self._bar.stop()


def open_display(stream: IO[str], step: int, total_steps: int) -> Display:
    """A live display on a terminal, lines elsewhere."""
    if stream.isatty():
        return LiveDisplay(stream, step, total_steps)
    return LogDisplay(stream)
