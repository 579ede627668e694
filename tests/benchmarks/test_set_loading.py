"""Rows of every form, what a bad file is told, and the real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prime.benchmarks import load
from megatron_prime.benchmarks.answers import normalized
from megatron_prime.benchmarks.load import load_set
from megatron_prime.data.chat import CODE_SUFFIX, MATH_SUFFIX, PRIME_SYSTEM_PROMPT
from megatron_prime.data.rows import DataError
from megatron_prime.known_sets import KNOWN_SETS
from megatron_prime.verify.math_answer import grade

FOLDERS = [folder / "shared" / "data" for folder in Path(__file__).parents]
REAL = next((folder for folder in FOLDERS if folder.is_dir()), Path("shared/data"))
TESTS = {"inputs": ["2 3\n"], "outputs": ["5\n"]}


@pytest.fixture
def loaded(tokenizer, write_rows):
    def read(rows, name="mine", template="plain", longest=10_000, first=0):
        return load_set(name, write_rows(rows), tokenizer, template, longest, 64, first)

    return read


@pytest.fixture
def with_code(monkeypatch):
    monkeypatch.setattr(load, "SUPPORTED_ABILITIES", ("math", "code"))


@pytest.mark.parametrize(
    ("row", "id_", "gold"),
    [
        ({"id": "a", "problem": "p", "answer": "4"}, "a", "4"),
        ({"unique_id": "test/1.json", "problem": "p", "answer": r"$\frac12$"}, "test/1.json",
         r"\frac12"),
        ({"problem": "p", "answer": 7}, "0", "7"),
        ({"id": 1606, "question": "p", "final_answer": ["$2$"]}, "1606", "2"),
        ({"id": 1, "question": "p", "final_answer": ["$2$", "$3$"]}, "1", "2, 3"),
        ({"idx": 3, "problem": "p", "solution": r"\boxed{1}, so \boxed{2.5e6}"}, "3", "2.5e6"),
    ],
)  # fmt: skip
def test_fields_of_mathematics(loaded, row, id_, gold):
    found = loaded([row])
    assert found.ids == (id_,)
    (prompt,) = found.prompts
    assert (prompt.ground_truth, prompt.ability, prompt.data_source) == (gold, "math", "mine")
    assert "".join(map(chr, prompt.token_ids)) == "<user>p<assistant>"


def test_the_papers_prompt(loaded, with_code):
    rows = [{"problem": "p", "answer": "4"}, {"problem": "q", "tests": TESTS, "id": "t"}]
    prompts = [loaded([row], template="prime").prompts[0] for row in rows]
    texts = ["".join(map(chr, prompt.token_ids)) for prompt in prompts]
    system = f"<system>{PRIME_SYSTEM_PROMPT}"
    assert texts == [
        f"{system}<user>p{MATH_SUFFIX}<assistant>",
        f"{system}<user>q{CODE_SUFFIX}<assistant>",
    ]


def test_programs_keep_their_tests_as_json(loaded, with_code):
    for tests in (TESTS, json.dumps(TESTS), {**TESTS, "fn_name": "add"}):
        (prompt,) = loaded([{"problem": "p", "tests": tests}]).prompts
        wanted = json.loads(tests) if isinstance(tests, str) else tests
        assert (prompt.ability, json.loads(prompt.ground_truth)) == ("code", wanted)


def test_a_program_is_shown_what_it_starts_from(loaded, with_code):
    def shown(**fields):
        (prompt,) = loaded([{"problem": "p", "tests": TESTS, **fields}]).prompts
        return "".join(map(chr, prompt.token_ids))

    start = "class Solution:\n    def add(self, a, b):"
    wanted = f"<user>p\n\nStart from this code:\n```python\n{start}\n```<assistant>"
    assert shown(starter_code=f"{start}\n        ") == wanted
    for nothing in ("", " \n", None):
        assert shown(starter_code=nothing) == "<user>p<assistant>"


def test_rows_of_the_training_data_do_as_well(loaded):
    row = {
        "data_source": "numina",
        "prompt": [{"role": "user", "content": "p"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
    }
    (prompt,) = loaded([row]).prompts
    assert (prompt.ground_truth, prompt.data_source) == ("4", "numina")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"problem": "p"}], "found None as answer"),
        ([{"problem": "p", "answer": ""}], "found '' as answer"),
        ([{"problem": "p", "answer": True}], "found True as answer"),
        ([{"problem": "p", "final_answer": []}], "found [] as answer"),
        ([{"answer": "4"}], "question: found nothing"),
        ([{"problem": "p", "tests": {"inputs": [1], "outputs": []}}], "of the same length"),
        ([{"problem": "p", "tests": "{"}], "tests: found no JSON"),
        ([{"problem": "p", "tests": TESTS, "starter_code": [1]}], "starter_code: found a list"),
        ([{"id": 1, "problem": "p", "answer": "4"}] * 2, "found the id '1' more than once"),
        ([{"problem": "p" * 99, "answer": "4"}], "raise data.max_prompt_length"),
    ],
)
def test_a_bad_file_is_told_what_is_wanted(loaded, rows, told):
    with pytest.raises(DataError) as refused:
        loaded(rows, longest=50)
    assert told in str(refused.value)
    assert 'evaluate.sets.mine: wanted jsonl or parquet with a line like {"id"' in str(
        refused.value
    )


def test_an_ability_nobody_checks_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(load, "SUPPORTED_ABILITIES", ("math",))
    with pytest.raises(DataError, match="'code': 1} problems without a verifier"):
        loaded([{"problem": "p", "tests": TESTS}])


def test_a_set_is_of_one_ability(loaded, with_code):
    rows = [{"problem": "p", "answer": "4"}] + [{"problem": "q", "tests": TESTS}] * 2
    for mixed in (rows, rows[::-1]):
        with pytest.raises(DataError, match="problems in one set, wanted one ability"):
            loaded(mixed)
    assert len(loaded(rows, first=1).prompts) == 1
    assert len(loaded(rows[1:]).prompts) == 2


def test_a_known_set_has_its_ability(loaded, with_code):
    with pytest.raises(DataError, match=r"found problems of ability \['math'\], wanted 'code'"):
        loaded([{"problem": "p", "answer": "4"}], "leetcode")


def test_a_known_set_says_which_file_it_wants(loaded):
    with pytest.raises(DataError, match="HuggingFaceH4/MATH-500"):
        loaded([{"problem": "p"}], "math500")


@pytest.mark.parametrize("name", KNOWN_SETS)
def test_the_example_of_a_set_is_one_that_is_read(loaded, with_code, name):
    row, _ = json.JSONDecoder().raw_decode(KNOWN_SETS[name].example)
    (prompt,) = loaded([row], name).prompts
    assert prompt.ability == KNOWN_SETS[name].ability
    assert prompt.ground_truth in KNOWN_SETS[name].example.replace("\\\\", "\\")


def test_only_the_sets_own_rows_count(loaded, with_code):
    years = [
        {"problem": f"{y}", "answer": f"0{y}.0", "url": f"x/{y}_AIME_I_Problems/Problem_1"}
        for y in (2023, 2024)
    ]
    found = loaded([*years, {"problem": "no url", "answer": "7"}], "aime2024")
    assert [p.prompt_id for p in found.prompts] == [1, 2]
    assert found.prompts[0].ground_truth == "02024"
    with pytest.raises(DataError, match="found no row of AIME 2024"):
        loaded(years[:1], "aime2024")
    days = ("2023-04-30", "2023-05-01T00:00:00", "2024-05-31", "2024-06-01")
    dated = [{"problem": day, "tests": TESTS, "contest_date": day} for day in days]
    assert [p.prompt_id for p in loaded(dated, "livecodebench").prompts] == [1, 2]


def test_the_first_problems_of_a_set(loaded):
    rows = [{"problem": f"p{i}", "answer": "4"} for i in range(5)]
    assert loaded(rows, first=2).ids == ("0", "1")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "file"),
    [("math500", "math500.jsonl"), ("amc", "amc.jsonl"), ("aime2024", "aime.jsonl")],
)
def test_the_real_files(tokenizer, name, file):
    """Every row is read, the gold answer in a box is right, and other problems' answers are not."""
    found = load_set(name, REAL / file, tokenizer, "prime", 100_000, 64)
    assert len(found.prompts) == KNOWN_SETS[name].problems
    assert all(grade(rf"\boxed{{{p.ground_truth}}}", p.ground_truth) == 1.0 for p in found.prompts)
    golds = [prompt.ground_truth for prompt in found.prompts]
    others = [
        (theirs, gold)
        for shift in (1, 2)  # two neighbours each
        for gold, theirs in zip(golds, golds[shift:] + golds[:shift], strict=True)
        if normalized(theirs) != normalized(gold)
    ]
    assert len(others) > 1.8 * len(golds)
    assert [pair for pair in others if grade(rf"\boxed{{{pair[0]}}}", pair[1]) != 0.0] == []
    if KNOWN_SETS[name].integers:
        assert all(prompt.ground_truth.lstrip("-").isdigit() for prompt in found.prompts)
