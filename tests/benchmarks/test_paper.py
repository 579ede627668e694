"""The paper's tables are the ones that were read, and their averages are looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prime.benchmarks import paper

FOLDERS = [folder / "shared" / "notes" for folder in Path(__file__).parents]
TABLES = next((f / "paper_tables.json" for f in FOLDERS if f.is_dir()), Path("paper_tables.json"))
COLUMNS = ("AIME2024", "AMC", "MATH500", "Minerva", "OlympiadBench", "LeetCode", "LiveCodeBench")


@pytest.mark.skipif(not TABLES.exists(), reason="the tables are not beside this checkout")
def test_the_tables_are_those_of_the_paper():
    found = json.loads(TABLES.read_text())
    for name, table in (("table2_main", paper.TABLE2), ("table3_algorithms", paper.TABLE3)):
        assert len(found[name]) == len(table)
        for row, ours in zip(found[name], table, strict=True):
            assert (row["method"], row["step"], row["Avg"]) == (
                ours.method,
                ours.step,
                ours.average,
            )
            assert tuple(row[column] for column in COLUMNS) == ours.cells
    assert [tuple(row.values()) for row in found["v2_avg16_T0.3"]] == [*paper.AVERAGE_OF_16]


def test_two_printed_averages_are_not_those_of_their_cells():
    """RLOO stands in both tables."""
    wrong = [row for row in (*paper.TABLE2, *paper.TABLE3) if not row.adds_up]
    told = [(row.method, row.step, row.average, round(row.mean, 2)) for row in wrong]
    assert told == [
        ("RLOO w/ OV only", 240, 36.9, 38.14),
        ("PRIME", 592, 43.9, 43.76),
        ("RLOO", 240, 36.9, 38.14),
    ]
