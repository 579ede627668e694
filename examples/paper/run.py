"""One command for each experiment of the paper, in miniature, on a CPU.

    python examples/paper/run.py FIGURE [--seeds N] [--out DIR] [--results DIR]
        [--only-report] [--section.key=value …]

FIGURE is 3, 4, 5, 8, 9, 10 or 11, as the paper counts them (5 is its 5 and 6), `rates`, `knobs`,
`groups` or `all`. What is missing is made: the task, the fine-tuned start, the runs of all arms
and seeds; what is there is not made again, and a killed command continues. The picture and the
table go to DIR/results, or where --results says. Knobs are set in all runs, which makes other runs.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from draw import draw
from experiments import EXPERIMENTS, Experiment
from localise import Found, localisation
from measure import Trace, markdown, row_of, trace_of
from runs import Place, Run, complete, run_of


def main(arguments: list[str] | None = None) -> None:
    """Make, measure, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("figure", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--seeds", type=int, help="default: 5 for figure 4, 3 for the others")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="where runs lie")
    parser.add_argument("--results", type=Path, help="where pictures and tables go")
    parser.add_argument("--only-report", action="store_true", help="of the runs that are there")
    options, knobs = parser.parse_known_args(arguments)
    if wrong := [knob for knob in knobs if not knob.startswith("--") or "=" not in knob]:
        parser.error(f"found {wrong}, wanted --section.key=value")
    sft = tuple(knob for knob in knobs if knob.startswith("--sft."))
    place = Place(options.out, tuple(knob for knob in knobs if knob not in sft), sft)
    for figure in EXPERIMENTS if options.figure == "all" else (options.figure,):
        experiment = EXPERIMENTS[figure]
        seeds = range(options.seeds or experiment.seeds)
        runs = [[run_of(place, arm, seed) for seed in seeds] for arm in experiment.all_arms]
        if not options.only_report:
            by_seed = [run for same_seed in zip(*runs, strict=True) for run in same_seed]
            complete(place, by_seed)
        report(place, experiment, runs, options.results or options.out / "results")


def report(
    place: Place, experiment: Experiment, runs: Sequence[Sequence[Run]], results: Path
) -> None:
    """Write picture, table and rewards of the seeds that all arms have."""
    done = [all(run.done for run in same_seed) for same_seed in zip(*runs, strict=True)]
    kept = [[run for run, there in zip(arm, done, strict=True) if there] for arm in runs]
    if not kept[0]:
        print(f"{experiment.heading}: no seed has all arms yet")
        return
    traces = [[trace_of(run) for run in arm] for arm in kept]
    results.mkdir(parents=True, exist_ok=True)
    stem = results / experiment.file_name
    rows = [
        row_of(arm.label, seeds, traces[0])
        for arm, seeds in zip(experiment.all_arms, traces, strict=True)
    ]
    lines = [markdown(rows)]
    for arm in kept:
        found = [place_found for run in arm for place_found in localisation(place, run)]
        if found:
            lines.append(localisation_line(arm[0].arm.label, found))
    stem.with_suffix(".md").write_text("\n".join(lines))
    draw(experiment, traces, stem.with_suffix(".png"))
    write_rewards(stem.with_suffix(".csv"), traces)
    print(f"## {experiment.heading}: {experiment.title}\n\n" + "\n".join(lines))


def localisation_line(label: str, found: Sequence[Found]) -> str:
    """A sentence for the table: by the rollout step at which the PRM was asked."""
    texts = []
    asked = [f for f in found if f.answers]
    for step in sorted({f.step for f in asked}):
        here = [f for f in asked if f.step == step]
        answers = sum(f.answers for f in here)
        hit = sum(f.lowest_is_first * f.answers for f in here) / answers
        guess = sum(f.chance * f.answers for f in here) / answers
        above = sum(f.right_above_wrong * f.answers for f in here) / answers
        texts.append(
            f"step {step}: {hit:.0%} (guessing {guess:.0%}; right above wrong {above:.0%})"
        )
    return f"PRM's lowest step is the first wrong one, {label}: {'; '.join(texts)}.\n"


def write_rewards(path: Path, traces: Sequence[Sequence[Trace]]) -> None:
    """All rewards and costs, to be looked at or drawn otherwise."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["arm", "seed", "step", "reward", "million_token_forwards"])
        for trace in (trace for seeds in traces for trace in seeds):
            for step, pair in enumerate(zip(trace.rewards, trace.costs, strict=True), start=1):
                rows.writerow([trace.arm, trace.seed, step, f"{pair[0]:.4f}", f"{pair[1]:.3f}"])


if __name__ == "__main__":
    main()
