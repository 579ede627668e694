"""What a preparation did: how many items each rule dropped, of which sources, with examples.

The same inputs give the same bytes: nothing here knows a clock. The examples are the first ones of
each rule, from different sources as far as there are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_prime.prepare.items import RULES, Dropped, Item
from megatron_prime.prepare.text import shorten

SHOWN = 3  # examples of a rule
SPLITS = ("train", "validation")


class Report:
    """Counts and examples; `options` are printed as they are."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._kept: Counter[tuple[str, str]] = Counter()  # split, source
        self._dropped: Counter[tuple[str, str]] = Counter()  # rule, source
        self._reworked: Counter[tuple[str, str]] = Counter()
        self._examples: dict[str, list[dict[str, str]]] = {}
        self._evaluation: list[dict[str, Any]] = []
        self._phrases = 0

    def keep(self, item: Item, split: str) -> None:
        """Count a kept item."""
        self._kept[split, item.source] += 1
        if item.reworked:
            self._reworked[item.reworked, item.source] += 1
            self._show(item.reworked, f"{item.text} → {item.ground_truth}", "", item)

    def drop(self, dropped: Dropped) -> None:
        """Count a dropped item."""
        self._dropped[dropped.rule, dropped.source] += 1
        self._show(dropped.rule, dropped.text, dropped.why, dropped)

    def evaluation(
        self, problems: Mapping[str, int], hit: Mapping[str, set[str]], phrases: int
    ) -> None:
        """What the evaluation files were found to share."""
        self._phrases = phrases
        self._evaluation = [
            {"file": name, "problems": count, "found_in_input": len(hit[name])}
            for name, count in problems.items()
        ]

    @property
    def kept(self) -> int:
        """Items that are written."""
        return sum(self._kept.values())

    def as_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(self._data(), indent=2, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        """Everything, for people."""
        data = self._data()
        lines = ["# Prepared data", "", *self.table(), "", "## Sources", ""]
        columns = ["source", "read", *SPLITS, "dropped", "most dropped by"]
        lines += _table(
            columns, [[name, *row.values()] for name, row in data["sources"].items()], "left"
        )
        if self._evaluation:
            lines += ["", "## Evaluation files", ""]
            lines += _table(
                ["file", "problems", "of these found in the input"],
                [list(row.values()) for row in self._evaluation],
            )
            lines += ["", f"Phrases of several problems that were ignored: {self._phrases}."]
        lines += ["", "## Examples", ""]
        for name, examples in data["examples"].items():
            lines.append(f"**{name}**")
            for example in examples:
                why = f" — {example['why']}" if example["why"] else ""
                lines.append(f"- {_code(example['place'])}{why}: {_code(example['text'])}")
            lines.append("")
        lines += ["## Options", "", "```json", json.dumps(self._options, indent=2), "```", ""]
        return "\n".join(lines)

    def table(self) -> list[str]:
        """The counts of all rules, a line each."""
        total = self.kept + sum(self._dropped.values())
        rows: list[list[Any]] = [["read", total, _share(total, total), ""]]
        for rule, count in self._rules().items():
            rows.append([f"− {rule}", count, _share(count, total), RULES[rule][0]])
        for split in SPLITS:
            count = _sum(self._kept, split)
            rows.append([split, count, _share(count, total), "written"])
        for name in sorted({name for name, _ in self._reworked}):
            count = _sum(self._reworked, name)
            rows.append([f"of these {name}", count, _share(count, total), "rewritten"])
        return _table(["", "rows", "share", ""], rows, "left")

    def _rules(self) -> dict[str, int]:
        counts = {rule: _sum(self._dropped, rule) for rule in RULES}
        return {rule: count for rule, count in counts.items() if count}

    def _data(self) -> dict[str, Any]:
        names = sorted({name for _, name in (*self._kept, *self._dropped)})
        order = [*RULES, *sorted({name for name, _ in self._reworked})]
        return {
            "read": self.kept + sum(self._dropped.values()),
            "kept": {split: _sum(self._kept, split) for split in SPLITS},
            "dropped": self._rules(),
            "reworked": {
                name: _sum(self._reworked, name) for name in order if _sum(self._reworked, name)
            },
            "sources": {name: self._source(name) for name in names},
            "evaluation": self._evaluation,
            "phrases_ignored": self._phrases,
            "examples": {n: self._examples[n] for n in order if n in self._examples},
            "options": self._options,
        }

    def _source(self, name: str) -> dict[str, Any]:
        kept = {split: self._kept[split, name] for split in SPLITS}
        rules = {rule: self._dropped[rule, name] for rule in RULES if self._dropped[rule, name]}
        dropped = sum(rules.values())
        read = {"read": sum(kept.values()) + dropped}
        return {**read, **kept, "dropped": dropped, "rules": rules}

    def _show(self, name: str, text: str, why: str, of: Item | Dropped) -> None:
        """Keep the first examples, one of each source before a second of any."""
        examples = self._examples.setdefault(name, [])
        example = {
            "place": of.place,
            "source": of.source,
            "why": shorten(why, 240),
            "text": shorten(text),
        }
        if len(examples) < SHOWN:
            examples.append(example)
            return
        sources = [e["source"] for e in examples]
        if of.source in sources:
            return
        again = [i for i, source in enumerate(sources) if source in sources[:i]]
        if again:
            examples[again[-1]] = example


def _sum(counts: Counter[tuple[str, str]], name: str) -> int:
    return sum(count for (key, _), count in counts.items() if key == name)


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "—"


def _table(head: list[str], rows: Iterable[list[Any]], last: str = "right") -> list[str]:
    """Lines of a Markdown table; numbers to the right."""
    dashes = ["---", *["---:"] * (len(head) - 1)]
    if last == "left":
        dashes[-1] = "---"
    body = [[_cell(value) for value in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, dashes, *body)]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        most = sorted(value.items(), key=lambda pair: -pair[1])[:3]
        value = ", ".join(f"{name} {count}" for name, count in most)
    return str(value).replace("|", "\\|")


def _code(text: str) -> str:
    """As a code span, which may hold backticks."""
    fence = "``" if "`" in text else "`"
    pad = " " if fence == "``" else ""
    return f"{fence}{pad}{text}{pad}{fence}"
