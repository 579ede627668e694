import json

import numpy as np
import pytest

from megatron_prime.data.rows import DataError
from megatron_prime.prepare.items import Dropped
from megatron_prime.prepare.overlap import Evaluation, problem_text, run_keys

LONG = (
    "A merchant buys forty barrels of oil at a fair in the north and sells every third one of them"
    " to a baker in the south for twice the price that was paid; how many barrels are left?"
)
MIDDLE = "How many barrels of oil are left in the cellar?"  # 10 words
SHORT = "How many barrels are left?"


@pytest.fixture
def against(write_jsonl):
    def make(*texts, **options):
        rows = [{"problem": text} for text in texts]
        return Evaluation([write_jsonl(rows, "test.jsonl")], **options)

    return make


def contaminated(evaluation, item):
    found = evaluation.check(item)
    return isinstance(found, Dropped) and found.rule == "contaminated"


def test_a_problem_within_other_text_is_found_and_told(against, make_item):
    evaluation = against(SHORT, LONG)
    found = evaluation.check(make_item(f"Here is an old one. {LONG.upper()} Explain."))
    assert found.rule == "contaminated"
    assert found.why.startswith("shares with test.jsonl row 1: 100%, as “a merchant buys forty")
    assert evaluation.hit == {"test.jsonl": {"test.jsonl row 1"}}
    assert evaluation.problems == {"test.jsonl": 2}


def test_a_quarter_of_the_runs_contaminates_and_fewer_do_not(against, make_item):
    count = len(LONG.split()) - 12
    for share, runs in ((0.25, -(-count // 4)), (0.5, -(-count // 2)), (0.0, 1)):
        evaluation = against(LONG, share=share)
        enough = " ".join(LONG.split()[: runs + 12])
        less = " ".join(LONG.split()[: runs + 11])
        assert contaminated(evaluation, make_item(f"Well, {enough} or so"))
        assert not contaminated(evaluation, make_item(f"Well, {less} or so"))


def test_twelve_words_are_no_run_of_thirteen(against, make_item):
    evaluation = against(LONG, share=0.0)
    assert not contaminated(evaluation, make_item(" ".join(LONG.split()[:12])))
    assert contaminated(evaluation, make_item(" ".join(LONG.split()[:13])))
    assert contaminated(against(LONG, length=8, share=0.0), make_item(" ".join(LONG.split()[:8])))


def test_problems_of_8_to_12_words_are_one_run_and_shorter_ones_the_whole_text(against, make_item):
    evaluation = against(MIDDLE, SHORT)
    assert contaminated(evaluation, make_item(f"Tell me! {MIDDLE} I wonder."))
    assert contaminated(evaluation, make_item("how many barrels  are left ?"))
    assert not contaminated(evaluation, make_item(f"{SHORT} I wonder."))


def test_short_problems_that_differ_by_an_operator_differ(against, make_item):
    evaluation = against("What is $3-5$?")
    assert not contaminated(evaluation, make_item("What is $3+5$?"))
    assert contaminated(evaluation, make_item("What is 3 - 5?"))


def test_phrases_of_three_problems_are_nobodys(against, make_item):
    phrase = "can be written as m over n where m and n are relatively prime positive integers find"
    asked = make_item(f"The length of the seventh edge {phrase} m")
    starts = ("In a square the area", "On a cube the volume", "Of two cards the chance")
    for share in (0.0, 0.25):
        evaluation = against(*(f"{start} {phrase} them" for start in starts), share=share)
        assert evaluation.phrases > 0
        assert not contaminated(evaluation, asked)
    for count in (1, 2):
        evaluation = against(*(f"{start} {phrase} them" for start in starts[:count]), share=0.0)
        assert contaminated(evaluation, asked)


def test_a_problem_that_stands_in_three_files_is_no_phrase(tmp_path, make_item):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path in paths:
        path.write_text(json.dumps({"problem": LONG}) + "\n")
    assert contaminated(Evaluation(paths), make_item(LONG + " Explain."))


def test_without_evaluation_files_all_is_clean(make_item):
    item = make_item(LONG)
    assert Evaluation([]).check(item) is item


def test_texts_shorter_than_a_run_and_empty_ones(against, make_item):
    evaluation = against(LONG)
    for text in ("", "?", "two words"):
        assert not contaminated(evaluation, make_item(text))


def test_run_keys_tell_order_and_are_as_many_as_runs():
    keys = np.array([1, 2, 3, 4], np.uint64)
    assert len(run_keys(keys, 3)) == 2
    assert len(run_keys(keys, 5)) == 0
    assert run_keys(keys[:2], 2) != run_keys(keys[:2][::-1].copy(), 2)
    assert run_keys(np.array([9, 2, 3, 4], np.uint64), 3)[1] == run_keys(keys, 3)[1]


def test_the_text_of_an_evaluation_row():
    assert problem_text({"problem": "a", "prompt": "b"}) == "a"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert problem_text({"prompt": messages}) == "u"


def test_files_without_a_problem_are_refused(write_jsonl):
    with pytest.raises(DataError, match=r"malformed rows: 2\n  line 1: found the fields \['q'\]"):
        Evaluation([write_jsonl([{"q": 1}, {"q": 2}])])
