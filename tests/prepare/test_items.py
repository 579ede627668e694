from pathlib import Path

import pytest

from megatron_prime.prepare.items import OURS, PAPER, RULES, drop

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_documentation_lists_all_rules_in_their_order_and_says_whose_they_are():
    table = DOCS.read_text().partition("## Rules")[2].partition("**Choice to open")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    assert [(row[0].strip().strip("`"), row[-1].strip()) for row in cells] == [
        (rule, origin) for rule, (_, origin) in RULES.items()
    ]
    assert {origin for _, origin in RULES.values()} == {PAPER, OURS}


def test_a_dropped_item_says_where_it_was(make_item):
    found = drop(make_item("text", number=4), "proof", "says so")
    assert (found.rule, found.why, found.place) == ("proof", "says so", "a.jsonl line 5")
    with pytest.raises(AssertionError):
        drop(make_item(), "mood", "no such rule")
