import pytest

from megatron_prime.prepare.golds import PoolGrader, check_golds
from megatron_prime.prepare.items import Dropped


def test_equal_texts_and_solutions_without_a_box_need_no_verifier(make_item):
    def nobody(pairs):
        raise AssertionError(f"asked about {pairs}")

    items = [
        make_item("p", "5", r"so \boxed{5}"),
        make_item("p", "5", "no box"),
        make_item("p", "5", None),
        make_item("p", "", r"\boxed{5}"),
    ]
    assert check_golds(items, nobody) == items


def test_verdicts_go_to_their_items(make_item):
    asked = []

    def grade(pairs):
        asked.extend(pairs)
        return [True, False, None]

    items = [
        make_item("a", "0.5", r"\boxed{1/2}"),
        make_item("b", "5", r"\boxed{5}"),
        make_item("c", "6", r"first \boxed{6} then \boxed{7}"),
        make_item("d", "8", r"\boxed{9^{9^9}}"),
    ]
    found = check_golds(items, grade)
    assert asked == [(r"\boxed{1/2}", "0.5"), (r"\boxed{7}", "6"), (r"\boxed{9^{9^9}}", "8")]
    assert found[:2] == items[:2]
    assert [type(f) for f in found[2:]] == [Dropped, Dropped]
    assert [f.rule for f in found[2:]] == ["unmatched", "unchecked"]
    assert "'7', not '6'" in found[2].why


@pytest.mark.timeout(600)
def test_the_projects_verifier_is_asked():
    with PoolGrader(workers=1, timeout_s=60.0) as grade:
        pairs = [(r"\boxed{\frac{1}{2}}", "1/2"), (r"\boxed{3}", "4"), (r"\boxed{1,000}", "1000")]
        assert grade(pairs) == [True, False, True]
        assert grade([(r"\boxed{x+1}", "1+x")]) == [True]
