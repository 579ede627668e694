"""What an evaluation found: `summary.json`, and `summary.md` with the paper's rows beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prime.benchmarks import metrics, paper
from megatron_prime.benchmarks.metrics import Figure
from megatron_prime.benchmarks.records import Record
from megatron_prime.known_sets import KNOWN_SETS

NONE = "—"


@dataclass(frozen=True, slots=True)
class Result:
    """One set's answers of one kind."""

    problems: int
    responses: int
    failures: int  # checks that crashed or ran out of time; they count as wrong
    tokens_mean: float  # of a response
    truncation_rate: float
    figures: Mapping[str, Figure]


Results = Mapping[str, Mapping[str, Result]]  # by set, then "greedy" or "sampled"


def result_of(records: Sequence[Record], kind: str, ability: str, seed: int) -> Result:
    """All metrics of a set's records."""
    responses = [response for record in records for response in record.responses]
    if kind == "greedy":
        problems = [{"pass@1": float(r.responses[0].score == 1.0)} for r in records]
    else:
        problems = [metrics.of_problem(record, ability == "math") for record in records]
    return Result(
        problems=len(records),
        responses=len(responses),
        failures=sum(record.checker_failures for record in records),
        tokens_mean=sum(len(r.token_ids) for r in responses) / len(responses),
        truncation_rate=sum(r.finish_reason == "length" for r in responses) / len(responses),
        figures=metrics.summarize(problems, seed),
    )


def as_json(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, in shares; intervals are of 95 %."""
    return {
        "about": dict(about),
        "sets": {
            name: {kind: asdict(result) for kind, result in kinds.items()}
            for name, kinds in results.items()
        },
        "paper_rows_whose_average_does_not_add_up": [
            {"method": row.method, "step": row.step, "printed": row.average, "mean": row.mean}
            for row in _wrong_averages()
        ],
    }


def as_markdown(results: Results, about: Mapping[str, Any]) -> str:
    """Own figures set by set, then the paper's tables with own rows on top."""
    parts = [f"# {about['policy']}", "", *_own(results)]
    greedy = {name: kinds["greedy"] for name, kinds in results.items() if "greedy" in kinds}
    parts += ["", "## Beside the paper: greedy pass@1 in percent", "", *_tables(greedy)]
    sampled = {name: kinds["sampled"] for name, kinds in results.items() if "sampled" in kinds}
    parts += ["", "## Beside the paper: mean of 16 samples in percent", "", *_sampled(sampled)]
    parts += ["", f"Own samples are of temperature {about['temperature']}, the paper's of 0.3."]
    return "\n".join(parts) + "\n"


def _own(results: Results) -> list[str]:
    lines = ["| set | problems | metric | percent | 95 % interval |", "|---|---|---|---|---|"]
    notes = []
    for name, kinds in results.items():
        for kind, result in kinds.items():
            for metric, figure in result.figures.items():
                interval = f"{figure.low:.1%} to {figure.high:.1%}".replace("%", "")
                share = f"{figure.value:.1%}".rstrip("%")
                lines.append(f"| {name} | {result.problems} | {metric} | {share} | {interval} |")
            notes.append(
                f"- {name}, {kind}: {result.responses} responses of {result.tokens_mean:.1f} "
                f"tokens on average, {result.truncation_rate:.1%} cut at the limit, "
                f"{result.failures} checks failed"
            )
    return [*lines, "", *notes]


def _tables(greedy: Mapping[str, Result]) -> list[str]:
    titles = [KNOWN_SETS[name].title for name in paper.SETS]
    lines = [
        f"| method | step | {' | '.join(titles)} | average |",
        f"|---|---|{'---|' * (len(titles) + 1)}",
        _own_row({name: result.figures["pass@1"].value for name, result in greedy.items()}, greedy),
    ]
    for title, table in (("Table 2", paper.TABLE2), ("Table 3", paper.TABLE3)):
        lines.append(f"| *{title}* |{' |' * (len(titles) + 2)}")
        lines += [_paper_row(row) for row in table]
    lines += ["", f"{NONE}: no number. Own average: only of all seven sets.", *_notes(greedy)]
    for row in _wrong_averages():
        lines.append(
            f"{row.method}, step {row.step} (†): the paper prints {row.average}, its cells give "
            f"{row.mean:.2f}."
        )
    return lines


def _own_row(shares: Mapping[str, float], results: Mapping[str, Result]) -> str:
    cells = []
    for name in paper.SETS:
        star = _star(name, results[name]) if name in results else ""
        cells.append(f"{100 * shares[name]:.1f}{star}" if name in shares else NONE)
    values = [shares[name] for name in paper.SETS if name in shares]
    whole = len(values) == len(paper.SETS)
    star = max(_star(name, results[name]) for name in paper.SETS) if whole else ""
    average = f"{100 * sum(values) / len(values):.1f}{star}" if whole else NONE
    return f"| **this model** | {NONE} | {' | '.join(cells)} | {average} |"


def _star(name: str, result: Result) -> str:
    """The mark of figures over other problems than the paper's."""
    return "" if result.problems == KNOWN_SETS[name].problems else "\\*"


def _notes(results: Mapping[str, Result]) -> list[str]:
    """What the stars mean, a line for each set that has one."""
    return [
        f"{KNOWN_SETS[name].title} (\\*): {result.problems} problems here, "
        f"{KNOWN_SETS[name].problems} in the paper."
        for name, result in results.items()
        if name in KNOWN_SETS and _star(name, result)
    ]


def _paper_row(row: paper.PaperRow) -> str:
    average = f"{row.average}" if row.adds_up else f"{row.average} † ({row.mean:.2f})"
    step = NONE if row.step is None else row.step
    return f"| {row.method} | {step} | {' | '.join(map(str, row.cells))} | {average} |"


def _wrong_averages() -> list[paper.PaperRow]:
    return [row for row in (*paper.TABLE2, *paper.TABLE3) if not row.adds_up]


def _sampled(sampled: Mapping[str, Result]) -> list[str]:
    cells = []
    shown = {
        name: sampled[name]
        for name in ("aime2024", "amc")
        if name in sampled and "avg@16" in sampled[name].figures
    }
    for name in ("aime2024", "amc"):
        found = shown.get(name)
        share = f"{100 * found.figures['avg@16'].value:.1f}{_star(name, found)}" if found else NONE
        cells.append(share)
    notes = _notes(shown)
    return [
        "| method | step | AIME 2024 | AMC |",
        "|---|---|---|---|",
        f"| **this model** | {NONE} | {' | '.join(cells)} |",
        *(f"| {m} | {step} | {aime} | {amc} |" for m, step, aime, amc in paper.AVERAGE_OF_16),
        *(["", *notes] if notes else []),
    ]
