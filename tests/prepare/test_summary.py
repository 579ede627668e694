import json
from dataclasses import replace

import pytest

from megatron_prime.prepare.items import drop
from megatron_prime.prepare.summary import Report


@pytest.fixture
def report(make_item):
    report = Report({"seed": 3})
    for i in range(6):
        item = replace(make_item(f"What | is {i}?", number=i), source="ab"[i % 2])
        report.keep(item, "validation" if i == 5 else "train")
    opened = replace(make_item("What is 2+3?", "5", number=6), reworked="choice_to_open")
    report.keep(opened, "train")
    for i in range(5):
        item = replace(make_item(f"Prove `{i}`.", number=7 + i), source="c" if i == 4 else "a")
        report.drop(drop(item, "proof", "says 'Prove'"))
    report.drop(drop(make_item("again", number=12), "duplicate", "is that of a.jsonl line 1"))
    report.evaluation({"test.jsonl": 30}, {"test.jsonl": {"x", "y"}}, 4)
    return report


def test_counts_add_up(report):
    data = json.loads(report.as_json())
    assert data["read"] == 13
    assert data["kept"] == {"train": 6, "validation": 1}
    assert data["dropped"] == {"proof": 5, "duplicate": 1}
    assert data["reworked"] == {"choice_to_open": 1}
    assert data["evaluation"] == [{"file": "test.jsonl", "problems": 30, "found_in_input": 2}]
    a = data["sources"]["a"]
    assert a == {"read": 7, "train": 3, "validation": 0, "dropped": 4, "rules": {"proof": 4}}
    for source in data["sources"].values():
        assert source["read"] == source["train"] + source["validation"] + source["dropped"]
        assert source["dropped"] == sum(source["rules"].values())
    assert sum(source["read"] for source in data["sources"].values()) == 13


def test_examples_are_the_first_ones_and_of_different_sources(report):
    examples = json.loads(report.as_json())["examples"]
    assert [e["place"] for e in examples["proof"]] == [
        "a.jsonl line 8",
        "a.jsonl line 9",
        "a.jsonl line 12",  # the only one of source c takes a place of source a
    ]
    assert examples["choice_to_open"][0]["text"] == "What is 2+3? → 5"


def test_the_tables_have_as_many_cells_in_each_row(report):
    lines = report.as_markdown().splitlines()
    assert "| − proof | 5 | 38.5% | asks for a proof (prove, show that) |" in lines
    assert "| read | 13 | 100.0% |  |" in lines
    assert "| test.jsonl | 30 | 2 |" in lines
    assert "- `a.jsonl line 13` — is that of a.jsonl line 1: `again`" in lines
    assert "- `a.jsonl line 8` — says 'Prove': `` Prove `0`. ``" in lines
    bars = [line.replace("\\|", "").count("|") for line in report.table()]
    assert len(set(bars)) == 1


def test_an_empty_report_divides_by_nothing():
    assert "| read | 0 | — |  |" in Report({}).table()
