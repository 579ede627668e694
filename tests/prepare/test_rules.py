import json

import pytest

from megatron_prime.prepare.items import RULES, Dropped, Item
from megatron_prime.prepare.rules import screen


@pytest.mark.parametrize(
    ("rule", "text", "truth"),
    [
        ("proof", "Prove that $n^2+n$ is even.", "even"),
        ("proof", "Let n be odd. Show that n is odd.", "odd"),
        ("proof", "What is it?", "proof"),
        ("figure", "Find the area of the figure.", "5"),
        ("figure", "In the diagram, find $x$.", "5"),
        ("figure", "Find x. [asy] draw((0,0)--(1,1)); [/asy]", "5"),
        ("figure", "Find x. ![](https://cdn.mathpix.com/a.jpg)", "5"),
        ("figure", "Find the area of the region shown below.", "5"),
        ("fill_in", r"The sum is \underline{\qquad}.", "5"),
        ("fill_in", "It is ____ and ____.", "5, 6"),
        ("no_gold", "Find x.", ""),
        ("no_gold", "Find x.", " $ "),
        ("no_gold", "Find x.", "notfound"),
        ("no_gold", "Find x.", r"\,"),
        ("no_gold", "Find x.", "?"),
        ("no_gold", "Find x.", "1" * 1001),  # the verifier would never say that it is right
        ("figure", "Find the slope of the line in the graph below.", "2"),
        ("figure", "How many cubes are in the picture?", "2"),
        ("choice", "What is 2+3? (a) 4 (b) 5 (c) 6", "b"),
        ("choice", "What is 2+3? a) 4 b) 5 c) 6", "(c)"),
        ("choice", "What is 2+3? ① 4 ② 5 ③ 6", "②"),
    ],
)
def test_what_falls_to_which_rule(make_item, rule, text, truth):
    found = screen(make_item(text, truth), drop_yes_no=False)
    assert isinstance(found, Dropped)
    assert (found.rule, found.text) == (rule, text)
    assert found.rule in RULES
    assert found.why


def test_the_first_rule_of_the_list_counts(make_item):
    everything = r"Show that ____ and ____ are right in the figure \underline{ }. (A) 1 (B) 2 (C) 3"
    order = list(RULES)
    fallen = []
    for text, truth in (
        (everything, ""),
        (everything.replace("Show that", "Say if"), ""),
        (everything.replace("Show that", "Say if"), "yes"),
        (everything.replace("Show that", "Say if").replace("figure", "text"), "yes"),
        ("Say which is right. (A) 1 (B) 2 (C) 3", "yes"),
        ("Say which is right. (A) 1 (B) 2 (C) 3", "5"),
    ):
        fallen.append(screen(make_item(text, truth), drop_yes_no=True).rule)
    assert fallen == ["proof", "no_gold", "figure", "fill_in", "yes_no", "choice"]
    assert sorted(fallen, key=order.index) == fallen


@pytest.mark.parametrize(
    "text",
    [
        "How much did the store improve its sales?",  # not "prove"
        "A proven method gives x = 5. What is x?",
        "Configure 5 items; how many ways?",  # not "figure"
        "How many significant figures does 0.0340 have?",
        "A six-figure sum of 100000 dollars grows by 5%. What is it now?",
        "The answer is ____.",
        r"What is $\overline{AB}$?",
        "Is 7 prime?",
    ],
)
def test_what_stays(make_item, text):
    item = make_item(text, "yes")
    assert screen(item, drop_yes_no=False) is item


def test_yes_and_no_are_dropped_only_when_asked(make_item):
    for truth in ("yes", r"\text{No}", "True."):
        item = make_item("Is it?", truth)
        assert screen(item, drop_yes_no=False) is item
        assert screen(item, drop_yes_no=True).rule == "yes_no"
    assert isinstance(screen(make_item("Is it?", "nothing"), drop_yes_no=True), Item)


@pytest.mark.parametrize(
    ("rule", "tests"),
    [
        ("no_gold", ""),
        ("no_gold", {"inputs": [], "outputs": []}),
        ("tests", "{"),
        ("tests", [1]),
        ("tests", {"inputs": ["1"], "outputs": []}),
        ("tests", {"inputs": ["1", "2"], "outputs": ["1"]}),
        ("tests", {"inputs": "1", "outputs": "2"}),
        ("tests", {"inputs": [1], "outputs": ["1"]}),
        ("tests", {"inputs": ["1"], "outputs": [[1]]}),
        ("tests", {"inputs": [1], "outputs": [1], "fn_name": "f"}),
        ("tests", {"inputs": [[1]], "outputs": [1], "fn_name": " "}),
        (None, {"inputs": ["1"], "outputs": ["2"]}),
        (None, {"inputs": [["1", "2"]], "outputs": [["3"]]}),  # lines
        (None, {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "f"}),
    ],
)
def test_code_needs_tests_that_can_be_run(make_item, rule, tests):
    truth = tests if isinstance(tests, str) else json.dumps(tests)
    found = screen(make_item("Prove it by a program.", truth, ability="code"), drop_yes_no=True)
    assert (found.rule if isinstance(found, Dropped) else None) == rule


def test_code_about_an_image_is_dropped_and_about_a_figure_is_not(make_item):
    tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    assert screen(make_item("See <image>.", tests, ability="code"), False).rule == "figure"
    assert isinstance(screen(make_item("Print the figure.", tests, ability="code"), False), Item)
