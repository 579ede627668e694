"""A run's curves on one page, from metrics.jsonl.

Small multiples over the step: what the policy can do, what the PRM knows, how far the updates go,
how long the answers are, where the time goes. Panels without figures are left out. The colours are
those of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#8A8A8A"
COLUMNS = 3
FEW_POINTS = 30  # as many get a marker each; more get a trend
TREND_STEPS = 10
MOST_BARS = 60


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric, what the legend calls it, and its colour."""

    metric: str
    label: str = ""
    color: str = BLUE


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share an axis."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: float | None = None  # a dashed line worth comparing with
    level_label: str = ""
    from_zero: bool = False
    logarithmic: bool = False


PANELS = (
    Panel("Fine-tuning loss", "nats per token", (Curve("sft/loss"),)),
    Panel("Held out: loss", "nats per token or answer", (Curve("held_out/loss"),)),
    Panel(
        "Held out: pairs ranked as labelled",
        "share of pairs",
        (Curve("held_out/pair_accuracy"),),
        level=0.5,
        level_label="chance",
    ),
    Panel(
        "Held out: calibration of σ(R)",
        "share of answers",
        (Curve("held_out/calibration_error"),),
        from_zero=True,
    ),
    Panel(
        "Accuracy",
        "share of answers",
        (
            Curve("rollout/accuracy", "sampled, before the filter"),
            Curve("evaluate/accuracy", "held out, greedy", VERMILLION),
        ),
    ),
    Panel(
        "PRM: pairs ranked as verified",
        "share of pairs",
        (
            Curve("prm/pair_accuracy_before", "before the update"),
            Curve("prm/pair_accuracy_after", "after it", VERMILLION),
        ),
        level=0.5,
        level_label="chance",
    ),
    Panel(
        "PRM loss",
        "nats per answer",
        (Curve("prm/loss", "loss"),),
        level=math.log(2),
        level_label="untrained (ce, dpo: ln 2)",
    ),
    Panel(
        "PRM: estimate against verifier",
        "share of answers",
        (
            Curve("prm/predicted_accuracy", "σ(R), mean"),
            Curve("filter/accuracy", "right", VERMILLION),
        ),
    ),
    Panel(
        "PRM: calibration of σ(R)",
        "share of answers",
        (
            Curve("prm/calibration_error", "error"),
            Curve("prm/over_optimisation_gap", "σ(R) less right", VERMILLION),
        ),
        level=0.0,
    ),
    Panel(
        "PRM: sequence reward R",
        "β · nats, mean",
        (
            Curve("prm/reward_right_mean", "of right answers"),
            Curve("prm/reward_wrong_mean", "of others", VERMILLION),
        ),
        level=0.0,
    ),
    Panel(
        "PRM: what R comes from",
        "",
        (
            Curve("prm/length_correlation", "correlation with length"),
            Curve("prm/last_tokens_share", "share of last tenth", VERMILLION),
        ),
        level=0.0,
    ),
    Panel(
        "PRM: policy updates since it learnt", "updates", (Curve("prm/staleness"),), from_zero=True
    ),
    Panel(
        "Critic: variance of returns explained",
        "share",
        (Curve("critic/explained_variance", "critic"),),
        level=0.0,
        level_label="a constant",
    ),
    Panel("Clipped tokens", "share of tokens", (Curve("policy/clip_fraction"),), from_zero=True),
    Panel("Policy moved by the update", "approx. KL, nats per token", (Curve("policy/approx_kl"),)),
    Panel("Policy entropy", "nats per token", (Curve("policy/entropy"),)),
    Panel(
        "Response length",
        "tokens, mean",
        (Curve("rollout/response_length_mean"),),
        from_zero=True,
    ),
    Panel(
        "Truncated responses",
        "share of answers",
        (Curve("rollout/truncation_rate"),),
        from_zero=True,
    ),
    Panel(
        "Rollout engine against trainer",
        "mismatch KL, nats per token",
        (Curve("rollout/mismatch_kl"),),
        logarithmic=True,
    ),
)
PHASES = (
    Curve("time/generate_s", "generate", SKY),
    Curve("time/score_s", "score", BLUE),
    Curve("time/update_prm_s", "update PRM", GREEN),
    Curve("time/update_critic_s", "update critic", YELLOW),
    Curve("time/update_policy_s", "update policy", ORANGE),
    Curve("time/sync_weights_s", "sync weights", VERMILLION),
    Curve("time/evaluate_s", "evaluate", PURPLE),
    Curve("time/checkpoint_s", "checkpoint", GREY),
)

Record = dict[str, float | None]


def draw_curves(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw the figures of `metrics_jsonl` into `png`.

    Raises ValueError if the file has nothing to draw.
    """
    records: list[Record] = [json.loads(line) for line in metrics_jsonl.read_text().splitlines()]
    names = {name for record in records for name in record}
    panels = [panel for panel in PANELS if any(curve.metric in names for curve in panel.curves)]
    phases = [phase for phase in PHASES if phase.metric in names]
    if not panels and not phases:
        raise ValueError(f"{metrics_jsonl} has no figures to draw; log at least one step first")
    rows = math.ceil(len(panels) / COLUMNS)
    size = (13, 3.1 * (rows + bool(phases)) + 0.6)
    figure: Any = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    if len(records) > FEW_POINTS:
        caption = f"thin: each step; thick: mean of the last {TREND_STEPS} steps"
        figure.text(0.99, 0.99, caption, ha="right", va="top", fontsize=9, color="#555555")
    grid = figure.add_gridspec(rows + bool(phases), COLUMNS)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(place, COLUMNS)])
        _draw_panel(axes, panel, records)
    if phases:
        _draw_seconds(figure.add_subplot(grid[rows, :]), phases, records)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)


def series(records: Sequence[Record], metric: str) -> tuple[list[int], list[float]]:
    """Steps that have `metric`, and its values; what was not finite is NaN and leaves a gap."""
    found = [(record["step"], record[metric]) for record in records if metric in record]
    steps = [int(step or 0) for step, _ in found]
    return steps, [math.nan if value is None else value for _, value in found]


def trailing_mean(values: Sequence[float], count: int) -> list[float]:
    """The mean of each value and those before it, `count` at most; NaN is left out."""
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - count) : end] if not math.isnan(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _draw_panel(axes: Any, panel: Panel, records: Sequence[Record]) -> None:
    shown: list[float] = []
    for curve in panel.curves:
        steps, values = series(records, curve.metric)
        if not steps:
            continue
        line = {"color": curve.color, "linewidth": 1.7, "label": curve.label}
        if len(steps) <= FEW_POINTS or curve.metric.startswith(("evaluate/", "held_out/")):
            axes.plot(steps, values, marker="o", markersize=3.5, **line)
        else:
            axes.plot(steps, values, color=curve.color, alpha=0.35, linewidth=0.7)
            axes.plot(steps, trailing_mean(values, TREND_STEPS), **line)
        shown += [value for value in values if not math.isnan(value)]
    if panel.level is not None:
        dashed = {"color": GREY, "linewidth": 1, "linestyle": (0, (4, 3))}
        axes.axhline(panel.level, label=panel.level_label, **dashed)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
    axes.yaxis.get_offset_text().set_horizontalalignment("right")  # the legend is on the other side
    if panel.from_zero:
        axes.set_ylim(0, 1.08 * max(shown, default=0) or 1)
    if panel.logarithmic:
        _whole_decades(axes, shown)
    _dress(axes, panel.title, panel.unit)
    if any(curve.label for curve in panel.curves):
        _legend_above(axes)


def _whole_decades(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis that begins and ends at a labelled tick; without values above 0, none."""
    positive = [value for value in values if value > 0]
    if positive:
        axes.set_yscale("log", nonpositive="mask")
        lowest, highest = math.floor(math.log10(min(positive))), math.log10(max(positive))
        axes.set_ylim(10.0**lowest, 10.0 ** max(math.ceil(highest), lowest + 1))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_seconds(axes: Any, phases: Sequence[Curve], records: Sequence[Record]) -> None:
    """Stacked bars; in long runs a bar is the mean of several steps."""
    timed = [record for record in records if any(phase.metric in record for phase in phases)]
    steps = [int(record["step"] or 0) for record in timed]
    count = math.ceil(len(timed) / MOST_BARS)
    starts = range(0, len(timed), count)
    chunks = [timed[start : start + count] for start in starts]
    spans = [(steps[start], steps[start : start + count][-1]) for start in starts]
    middles = [(first + last) / 2 for first, last in spans]
    widths = [0.85 * (last - first + 1) for first, last in spans]
    bottom = [0.0] * len(chunks)
    for phase in phases:
        heights = [sum(r.get(phase.metric) or 0.0 for r in chunk) / len(chunk) for chunk in chunks]
        axes.bar(middles, heights, widths, bottom=bottom, color=phase.color, label=phase.label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    unit = "seconds per step" if count == 1 else f"seconds per step, mean of {count}"
    _dress(axes, "Where the time goes", unit)
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.01)
    _legend_above(axes)


def _dress(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=20)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=8.5, length=3)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_above(axes: Any) -> None:
    """Between title and plot, where no curve can run."""
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(PHASES),
        frameon=False,
        fontsize=8.5,
        borderaxespad=0.1,
        borderpad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )
    legend.set_in_layout(False)  # the title's pad has made room; panels keep their width
