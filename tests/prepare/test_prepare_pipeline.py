import json
from pathlib import Path

import pytest

from megatron_prime.data.rows import DataError
from megatron_prime.prepare.items import drop
from megatron_prime.prepare.overlap import Evaluation
from megatron_prime.prepare.pipeline import Task, prepare, split_of
from megatron_prime.prepare.sources import RL_FORMATS


@pytest.fixture
def task(tmp_path):
    def make(*inputs, out="out", evaluation=(), finish=None, **options):
        return Task(
            inputs=tuple(inputs),
            out=tmp_path / out,
            formats=RL_FORMATS,
            screen=lambda items: items,
            finish=finish or (lambda item, split: {"n": item.number, "split": split}),
            evaluation=Evaluation(evaluation),
            **options,
        )

    return make


def numina(i, answer="1"):
    return {"problem": f"What is the remainder of {i} by seven?", "answer": answer}


def numbers(path: Path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_rows_come_out_in_their_order_without_repeats(task, tmp_path, write_jsonl):
    path = write_jsonl([numina(i % 30) for i in range(1300)])
    read = []
    report = prepare(task(path), {"a": 1}, read.append)
    assert numbers(tmp_path / "out" / "train.jsonl") == list(range(30))
    assert read == [512, 1024, 1300]
    data = json.loads(report.as_json())
    assert data["dropped"] == {"duplicate": 1270}
    assert data == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "report.md").read_text() == report.as_markdown()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.json",
        "report.md",
        "train.jsonl",
    ]


def test_a_dropped_item_does_not_take_its_twin_along(task, tmp_path, write_jsonl):
    def finish(item, split):
        return drop(item, "too_long", "") if item.number == 0 else {"n": item.number}

    path = write_jsonl([numina(1), numina(1), numina(1)])
    prepare(task(path, finish=finish), {})
    assert numbers(tmp_path / "out" / "train.jsonl") == [1]


def test_what_is_in_the_evaluation_file_stays_out(task, tmp_path, write_jsonl):
    held = write_jsonl([{"problem": numina(5)["problem"]}], "test.jsonl")
    path = write_jsonl([numina(i) for i in range(8)])
    report = prepare(task(path, evaluation=[held]), {})
    assert numbers(tmp_path / "out" / "train.jsonl") == [0, 1, 2, 3, 4, 6, 7]
    assert json.loads(report.as_json())["evaluation"][0]["found_in_input"] == 1


def test_the_split_depends_on_seed_and_text_alone(task, tmp_path, write_jsonl):
    few = write_jsonl([numina(i) for i in range(100, 400)], "few.jsonl")
    many = write_jsonl([numina(i) for i in range(999)], "many.jsonl")
    prepare(task(few, out="few", validation=0.2), {})
    prepare(task(many, out="many", validation=0.2), {})
    prepare(task(few, out="more", validation=0.3), {})
    prepare(task(few, out="seed", validation=0.2, seed=1), {})
    found = {
        name: {n + first for n in numbers(tmp_path / name / "validation.jsonl")}
        for name, first in (("few", 100), ("many", 0), ("more", 100), ("seed", 100))
    }
    assert found["few"] == {n for n in found["many"] if 100 <= n < 400}
    assert found["few"] < found["more"]
    assert found["few"] != found["seed"]
    assert 35 < len(found["few"]) < 85  # 60 ± 3.6 standard deviations
    train = {n + 100 for n in numbers(tmp_path / "few" / "train.jsonl")}
    assert train | found["few"] == set(range(100, 400))
    assert not train & found["few"]
    assert split_of("What is x?", 0, 0.5) == split_of(" what is $x$ ?", 0, 0.5)


def test_malformed_rows_are_told_all_at_once_and_nothing_is_written(task, tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(numina(1))
    path.write_text("\n".join([good, "{", good, '{"problem": 5, "answer": "1"}', "[]"]))
    with pytest.raises(DataError) as error:
        prepare(task(path), {})
    told = str(error.value)
    assert "malformed rows: 3" in told
    assert [told.count(f"  line {n}: ") for n in range(1, 6)] == [0, 1, 0, 1, 1]
    assert "--malformed drop" in told
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_malformed_rows_can_be_counted_instead(task, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(numina(1)), "{", "[]"]))
    data = json.loads(prepare(task(path, drop_malformed=True), {}).as_json())
    assert (data["read"], data["dropped"]) == (3, {"malformed": 2})
    assert data["examples"]["malformed"][0]["place"] == "bad.jsonl line 2"


def test_if_nothing_is_left_the_counts_are_told(task, tmp_path, write_jsonl):
    path = write_jsonl([numina(1)])
    with pytest.raises(DataError, match=r"(?s)no row that all rules keep.*too_long \| 1 \|"):
        prepare(task(path, finish=lambda item, split: drop(item, "too_long", "")), {})
    assert not (tmp_path / "out").exists()
