"""An experiment's picture: reward over steps and over cost, and what the PRM knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import Experiment
from matplotlib.figure import Figure
from measure import Trace, interval, smooth

from megatron_prime.report.curves import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION

COLORS = (GREY, VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, "#000000", "#B8A200")


def draw(experiment: Experiment, traces: Sequence[Sequence[Trace]], png: Path) -> None:
    """Draw all arms (the baseline first) with their seeds; thick: the mean, band: its interval."""
    panels = 3 if experiment.prm else 2
    figure: Any = Figure(figsize=(4.3 * panels, 3.9), layout="constrained")
    figure.suptitle(
        f"{experiment.heading} in miniature: {experiment.title}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    axes = figure.subplots(1, panels)
    for arm, seeds, color in zip(experiment.all_arms, traces, COLORS, strict=False):
        steps = range(1, min(len(trace.rewards) for trace in seeds) + 1)
        curves = [smooth(trace.rewards)[: len(steps)] for trace in seeds]
        _band(axes[0], steps, curves, color, arm.label)
        for trace, curve in zip(seeds, curves, strict=True):
            axes[1].plot(trace.costs[: len(steps)], curve, color=color, linewidth=0.9, alpha=0.8)
        if experiment.prm and seeds[0].pair_accuracy:
            known = [smooth(trace.pair_accuracy)[: len(steps)] for trace in seeds]
            _band(axes[2], steps, known, color, arm.label)
    _dress(axes[0], "Training reward", "rollout step", "sampled accuracy, 10-step mean")
    _dress(axes[1], "… against cost, each seed", "million token-forwards", "")
    if experiment.prm:
        _dress(axes[2], "PRM: pairs ranked as verified", "rollout step", "share, 10-step mean")
        axes[2].axhline(0.5, color="#999999", linewidth=0.8, linestyle="--")
    axes[0].legend(loc="upper left", frameon=False, fontsize=8)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=80)


def _band(axes: Any, steps: range, curves: list[list[float]], color: str, label: str) -> None:
    found = [interval(values) for values in zip(*curves, strict=True)]
    mean = [point.mean for point in found]
    axes.plot(steps, mean, color=color, linewidth=1.8, label=label)
    if len(curves) < 3:  # an interval of two seeds is wider than any axis
        for curve in curves:
            axes.plot(steps, curve, color=color, linewidth=0.6, alpha=0.6)
    else:
        low = [point.mean - point.half for point in found]
        high = [point.mean + point.half for point in found]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def _dress(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
