"""The last steps of a run on one picture: who did what when, and who waited.

A row per rank, time from left to right. The colours are the phases of `curves.py`. Where decode
slots stand empty the bar of a generation thins out; time in which the whole rank waits is hatched,
by cause. A dark mark above the bar is memory on the move. What is read are the ranks' trace files
(`runtime/trace.py`), so it can be drawn again at any time, also of a run that crashed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_prime.errors import Interrupted
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.runtime.trace import Trace, rank_file

LAST_STEPS = 3
MOVES, LONG_TAIL = "move", "long tail"
MOST_RANKS = 16
HATCHES = {"verifying": "......", "straggling": "//////", "switching": "xxxxxx"}
DARK, EDGE, EMPTY = "#333333", "#8C8C8C", "#F1F1F1"
BAR, MARK = (0.22, 0.64), (0.06, 0.1)  # from the top, and height, in a row of height 1


@dataclass(frozen=True, slots=True)
class Span:
    """An event with a length; seconds."""

    lane: str
    name: str
    start: float
    end: float


class Box(NamedTuple):
    """A rectangle; seconds from the picture's start, rows from its top."""

    left: float
    width: float
    top: float
    height: float


@dataclass(slots=True)
class RankEvents:
    """What a rank's trace holds, in seconds of the wall clock."""

    spans: list[Span] = field(default_factory=list)
    steps: dict[int, float] = field(default_factory=dict)  # when each was done
    levels: list[tuple[float, float]] = field(default_factory=list)  # share of slots at work, from


class TimedRanks(Protocol):
    """What is needed of `WorldRanks`."""

    rank: int
    world_size: int
    timeline: Timeline


@contextmanager
def drawn_timeline(ranks: TimedRanks, folder: Path, resume_step: int) -> Iterator[Timeline]:
    """This rank's timeline, with a file; drawn by rank 0 when the run is done or interrupted."""
    timeline = ranks.timeline
    timeline.trace = Trace(folder, ranks.rank, fresh=resume_step == 0)
    interrupted: Interrupted | None = None
    try:
        yield timeline
    except Interrupted as stop:
        interrupted = stop
    timeline.close()
    if ranks.rank == 0:
        draw_timeline(folder, ranks.world_size, str(folder))
    if interrupted is not None:
        raise interrupted


def draw_timeline(folder: Path, ranks: int, title: str) -> None:
    """Draw the last steps in the traces of the run in `folder` into its timeline.png.

    Of more than MOST_RANKS ranks, so many at equal distances. Nothing without a complete step.
    """
    shown = [rank * ranks // min(ranks, MOST_RANKS) for rank in range(min(ranks, MOST_RANKS))]
    found = {rank: read_events(rank_file(folder, rank)) for rank in shown}
    marks = sorted(found[0].steps.items())[-LAST_STEPS - 1 :]
    if not marks:
        return
    first = min(span.start for span in found[0].spans)
    if len(marks) <= LAST_STEPS:  # the run's beginning
        marks = [(marks[0][0] - 1, first), *marks]
    some = "" if len(shown) == ranks else f", {len(shown)} of {ranks} ranks"
    Picture(found, marks, f"{title}{some}").draw(folder / "timeline.png")


def read_events(path: Path) -> RankEvents:
    """The events of a rank's trace; an unfinished last line is left out."""
    found = RankEvents()
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        if not (line.startswith("{") and line.endswith("},")):
            continue
        event: dict[str, Any] = json.loads(line[:-1])
        at = event.get("ts", 0) / 1e6
        if event["ph"] == "X":
            end = at + event["dur"] / 1e6
            found.spans.append(Span(event["cat"], event["name"], at, end))
        elif event["ph"] == "i":
            found.steps[event["args"]["step"]] = at
        elif event["ph"] == "C":
            found.levels.append((at, event["args"][event["name"]]))
    return found


class Picture:
    """The figure: rectangles are collected row by row, then drawn look by look."""

    def __init__(
        self, ranks: dict[int, RankEvents], marks: Sequence[tuple[int, float]], title: str
    ) -> None:
        """`marks`: when each step was done; the picture begins with the first."""
        from matplotlib.figure import Figure  # only here: it takes a second

        self._ranks, self._marks = ranks, marks
        self._start, self._end = marks[0][1], marks[-1][1]
        self._figure: Any = Figure(figsize=(13, 2.0 + 0.42 * len(ranks)), layout="constrained")
        layout: Any = self._figure.get_layout_engine()
        layout.set(w_pad=0.1, h_pad=0.1)
        self._figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        self._axes: Any = self._figure.add_subplot()
        self._boxes: dict[str, list[Box]] = {}

    def draw(self, png: Path) -> None:
        """Draw it all."""
        for row, events in enumerate(self._ranks.values()):
            for span in events.spans:
                top, height = MARK if span.lane == "moves" else BAR
                name = MOVES if span.lane == "moves" else span.name
                if span.lane in ("phases", "idle", "moves"):
                    self._collect(name, span.start, span.end, row + top, height)
            for (since, level), (until, _) in pairwise(events.levels):
                if 0 < level < 1:  # of the bar, as much from its top as slots stand empty
                    height = BAR[1] * (1 - level)
                    self._collect(LONG_TAIL, since, until, row + BAR[0], height)
        self._draw_boxes()
        self._draw_steps()
        self._dress()
        self._figure.savefig(png, dpi=110)

    def _collect(self, name: str, start: float, end: float, top: float, height: float) -> None:
        start, end = max(start, self._start), min(end, self._end)
        if end > start:
            box = Box(start - self._start, end - start, top, height)
            self._boxes.setdefault(name, []).append(box)

    def _draw_boxes(self) -> None:
        drawn = {}
        for name, (label, look) in looks().items():
            if boxes := self._boxes.get(name):
                left, width, top, height = zip(*boxes, strict=True)
                drawn[label] = self._axes.bar(
                    left, height, width, top, align="edge", linewidth=0, **look
                )
        self._figure.legend(
            drawn.values(),
            drawn.keys(),
            loc="outside lower left",
            ncols=6,
            frameon=False,
            fontsize=8.5,
            handlelength=1.6,
        )

    def _draw_steps(self) -> None:
        for (_, since), (step, until) in pairwise(self._marks):
            self._axes.annotate(
                f"step {step}",
                ((since + until) / 2 - self._start, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
            if until < self._end:
                self._axes.axvline(until - self._start, color=DARK, linewidth=0.9, zorder=4)

    def _dress(self) -> None:
        axes, rows = self._axes, len(self._ranks)
        axes.set_xlim(0, self._end - self._start)
        axes.set_ylim(rows, 0)
        middles = [row + BAR[0] + BAR[1] / 2 for row in range(rows)]
        axes.set_yticks(middles, [f"rank {rank}" for rank in self._ranks])
        axes.set_xlabel("seconds", fontsize=9)
        axes.tick_params(labelsize=8.5, length=3)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)


def looks() -> dict[str, tuple[str, dict[str, Any]]]:
    """What the legend calls each kind of box, and how it is drawn, in the legend's order."""
    from megatron_prime.report.curves import PHASES

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for curve in PHASES:
        phase = curve.metric.removeprefix("time/").removesuffix("_s")
        found[phase] = (curve.label, {"color": curve.color})
    found[LONG_TAIL] = ("idle: long tail", {"color": EMPTY, "zorder": 3})
    for cause, hatch in HATCHES.items():
        look = {"facecolor": EMPTY, "edgecolor": EDGE, "hatch": hatch, "zorder": 3}
        found[cause] = (f"idle: {cause}", look)
    found[MOVES] = ("memory moves", {"color": DARK})
    return found
