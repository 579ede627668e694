"""What is read off a run, and off several seeds of an arm: the figures that README.md fixes.

reward      sampled accuracy of everything generated in a step, before the prompt filter; curves
            show its mean over ten steps
final       mean reward of the last ten steps
reaches     the first step at which the ten-step mean is at least the final reward of the baseline's
            run with the same seed, over the steps of that run; one that never gets there counts
            as `NEVER`
cost        tokens put through a model, a backward pass counted as two more forwards
Intervals are Student's t at 95 % over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from runs import Run

WINDOW = 10
NEVER = math.inf
# 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and its 95 % interval's half width; NaN for a single seed."""

    mean: float
    half: float

    def __format__(self, form: str) -> str:
        """As the tables show it."""
        mean = format(self.mean, form)
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.3f}"


@dataclass(frozen=True, slots=True)
class Trace:
    """A run's figures, step by step."""

    arm: str
    seed: int
    rewards: tuple[float, ...]
    costs: tuple[float, ...]  # up to and with each step, in million token-forwards
    held_out: float  # greedy accuracy after the last step
    pair_accuracy: tuple[float, ...]  # empty without a PRM
    cpu_s: float | None  # of the whole process; None if it was interrupted

    @property
    def final(self) -> float:
        """Mean reward of the last steps."""
        return statistics.fmean(self.rewards[-WINDOW:])


def trace_of(run: Run) -> Trace:
    """Read a complete run."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "rollout/accuracy" in record]
    total, costs = 0.0, []
    for record in steps:
        total += cost_of(run, record)
        costs.append(total / 1e6)
    pairs = [record.get("prm/pair_accuracy_before") for record in steps]
    return Trace(
        run.arm.name,
        run.seed,
        tuple(record["rollout/accuracy"] for record in steps),
        tuple(costs),
        records[-1]["evaluate/accuracy"],
        tuple(pairs) if pairs and pairs[0] is not None else (),
        json.loads((run.folder / "cost.json").read_text())["cpu_s"],
    )


def cost_of(run: Run, record: dict[str, float]) -> float:
    """Response tokens that a step put through models: generated, scored, trained on.

    A forward counts once and a training pass three times. Trained on is the batch, at the mean
    length of what was generated.
    """
    config = run.config
    rows = config.rollout.prompts_per_step * config.rollout.group_size
    batch = rows * record["rollout/response_length_mean"]
    passes = 3.0  # the policy's update
    if rows > config.policy.mini_batch_size or config.policy_is_reference:
        passes += 1.0  # old log-probs that the update can't give
    if config.uses_prm:
        passes += {"single": 3.0, "single_strict": 4.0, "double": 4.0, "frozen": 1.0}[
            config.prm.forward
        ]
        passes += 0.0 if config.policy_is_reference else 1.0
        passes += 1.0 if config.prm.loss in ("dpo", "nca", "kto") else 0.0
    if config.advantage.estimator == "gae":
        passes += 4.0  # the critic's values of before its update, and that
    return record["rollout/tokens"] + passes * batch


def smooth(values: Sequence[float], count: int = WINDOW) -> list[float]:
    """The mean of each value and those before it, `count` at most."""
    return [
        statistics.fmean(values[max(0, end - count) : end]) for end in range(1, len(values) + 1)
    ]


def reaches(trace: Trace, baseline: Trace) -> float:
    """The share of the baseline's steps after which `trace` is as good as it ends; or NEVER.

    Not before a whole window of steps is there.
    """
    means = smooth(trace.rewards)
    for step in range(min(WINDOW, len(means)), len(means) + 1):
        if means[step - 1] >= baseline.final - 1e-12:
            return step / len(baseline.rewards)
    return NEVER


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of independent seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2 or math.isnan(mean):
        return Interval(mean, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, STUDENT[len(values) - 1] * error)


@dataclass(frozen=True, slots=True)
class Row:
    """An arm in the table of an experiment."""

    label: str
    seeds: int
    final: Interval
    gain: Interval | None  # over the baseline's final reward, seed by seed; None: it is that
    held_out: Interval
    reaches: tuple[float, ...]  # of each seed
    spread: Interval  # standard deviation of the reward around its ten-step mean
    cost: float  # of all steps, over the baseline's
    cpu_s: Interval | None


def row_of(label: str, traces: Sequence[Trace], baseline: Sequence[Trace]) -> Row:
    """Compare an arm's seeds with the baseline's, each with its own."""
    pairs = list(zip(traces, baseline, strict=True))
    same = all(mine is other for mine, other in pairs)
    seconds = [trace.cpu_s for trace in traces if trace.cpu_s is not None]
    return Row(
        label,
        len(traces),
        interval([trace.final for trace in traces]),
        None if same else interval([mine.final - other.final for mine, other in pairs]),
        interval([trace.held_out for trace in traces]),
        tuple(reaches(mine, other) for mine, other in pairs),
        interval([roughness(trace) for trace in traces]),
        statistics.fmean(mine.costs[-1] / other.costs[-1] for mine, other in pairs),
        interval(seconds) if seconds else None,
    )


def roughness(trace: Trace) -> float:
    """Standard deviation of the reward around its ten-step mean."""
    means = smooth(trace.rewards)
    off = [r - m for r, m in zip(trace.rewards[WINDOW:], means[WINDOW:], strict=True)]
    return statistics.pstdev(off) if off else math.nan


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| arm | seeds | final reward | over the baseline | held out, greedy | reaches the"
        " baseline's final reward after | roughness | cost | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reached = sorted(share for share in row.reaches if share != NEVER)
        never = len(row.reaches) - len(reached)
        median = f"{statistics.median(row.reaches):.0%}" if not never else "–"
        span = ", ".join(f"{share:.0%}" for share in reached) + (
            f"; never: {never}" if never else ""
        )
        cells = [
            row.label,
            str(row.seeds),
            f"{row.final:.3f}",
            "" if row.gain is None else f"{row.gain:+.3f}",
            f"{row.held_out:.3f}",
            "" if row.gain is None else f"{median} ({span.removeprefix('; ')})",
            f"{row.spread:.3f}",
            f"{row.cost:.2f} ×",
            "" if row.cpu_s is None else f"{row.cpu_s.mean:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
