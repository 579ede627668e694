import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_prime.prepare.duplicates import BANDS, ROWS, Seen, band_keys, min_hashes
from megatron_prime.prepare.items import Dropped, Item

TEXT = "A train leaves the station at 60 miles per hour and another follows at 75 miles per hour."


def rule(found):
    return found.rule if isinstance(found, Dropped) else None


def test_the_first_stays_and_what_repeats_it_names_its_place(make_item):
    seen = Seen()
    first = make_item(TEXT, "5", number=3, file="one.jsonl")
    assert seen.check(first) is first
    assert seen.check(make_item("Another problem entirely?", "5", number=9, file="one.jsonl"))
    found = seen.check(make_item(f" {TEXT.upper()} ", "5", number=4, file="two.jsonl"))
    assert (found.rule, found.why) == ("duplicate", "is that of one.jsonl line 4")
    found = seen.check(make_item(TEXT, "6", number=5, file="two.jsonl"))
    assert (found.rule, "one.jsonl line 4" in found.why) == ("conflict", True)
    close = TEXT.replace("another follows", "a second follows")
    found = seen.check(make_item(close, "5", number=6, file="two.jsonl"))
    assert (found.rule, found.why) == ("near_duplicate", "is like one.jsonl line 4")


def test_parquet_places_are_rows(make_item):
    seen = Seen()
    seen.check(replace(make_item(TEXT, number=3, file="x.parquet"), place="x.parquet row 3"))
    found = seen.check(make_item(TEXT, number=0, file="y.jsonl"))
    assert found.why == "is that of x.parquet row 3"


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (TEXT.replace("75", "80"), "5"),  # another number
        (TEXT.replace("another", "a second"), "6"),  # another answer
        ("How many primes are there between 60 and 75? Write their sum in words.", "5"),
    ],
)
def test_what_is_no_near_duplicate(make_item, text, truth):
    seen = Seen()
    seen.check(make_item(TEXT, "5"))
    assert rule(seen.check(make_item(text, truth))) is None


def test_near_duplicates_can_be_left_in(make_item):
    seen = Seen(near=False)
    seen.check(make_item(TEXT, "5"))
    assert rule(seen.check(make_item(TEXT.replace("another", "a second"), "5"))) is None
    assert rule(seen.check(make_item(TEXT, "5"))) == "duplicate"


def test_of_programs_the_text_alone_counts(make_item):
    seen = Seen()
    seen.check(make_item(TEXT, '{"inputs": ["1"], "outputs": ["2"]}', ability="code"))
    assert rule(seen.check(make_item(TEXT, "{}", ability="code"))) == "duplicate"


def test_an_item_without_a_number_or_of_one_character(make_item):
    seen = Seen()
    assert isinstance(seen.check(make_item("x", "1")), Item)
    assert isinstance(seen.check(make_item("", "1")), Item)
    assert rule(seen.check(make_item("x", "1"))) == "duplicate"


def jaccard(one, other):
    a, b = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (one, other))
    return len(a & b) / len(a | b)


def test_equal_hashes_estimate_the_similarity_of_sets():
    rng = random.Random(0)
    one = "".join(rng.choice("abcdefgh") for _ in range(400))
    errors = []
    for cut in (10, 40, 100, 200, 390):
        other = one[:-cut] + "".join(rng.choice("ijklmnop") for _ in range(cut))
        estimate = float(np.mean(min_hashes(one) == min_hashes(other)))
        errors.append(abs(estimate - jaccard(one, other)))
    assert max(errors) < 0.14  # three standard deviations of 112 hashes


def test_bands_meet_as_often_as_the_docstring_says():
    rng = random.Random(1)
    met = {0.5: 0, 0.9: 0}
    for target in met:
        for _ in range(100):
            one = "".join(rng.choice("abcdefghijklmnop") for _ in range(300))
            cut = round(296 * (1 - target) / (1 + target))  # sets of 296, cut of them differ
            other = one[:-cut] + "".join(rng.choice("qrstuvwx") for _ in range(cut))
            assert abs(jaccard(one, other) - target) < 0.02
            met[target] += not set(band_keys(one, "")).isdisjoint(band_keys(other, ""))
    assert met[0.9] >= 98  # 99.96 %
    assert met[0.5] <= 16  # 5.3 %


def test_bands_of_another_context_never_meet():
    assert len(set(band_keys(TEXT, "1") + band_keys(TEXT, "2"))) == 2 * BANDS
    assert len(min_hashes(TEXT)) == BANDS * ROWS


def test_a_kept_item_costs_290_to_580_bytes(make_item):
    rng, seen = random.Random(2), Seen()
    for i in range(2000):
        text = " ".join("".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(12))
        assert isinstance(seen.check(make_item(text, str(i))), Item)
    assert 285 < seen.nbytes / 2000 < 580
