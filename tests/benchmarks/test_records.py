"""Files that a kill may hit at any byte, and options that may not change."""

from __future__ import annotations

import json

import pytest

from megatron_prime.benchmarks.records import Records, Scored, Scores
from megatron_prime.runtime.line_files import RecordsError

OPTIONS = {"samples": 2, "temperature": 0.3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "digits" / "sampled.jsonl"


@pytest.fixture
def seven(make_record):
    """Records of seven problems; chunks are of three."""
    return [make_record([1.0, 0.5], ["4", None], name=f"p{i}") for i in range(7)]


def written(path, records):
    file = Records(path, OPTIONS, 3, 7)
    for start in range(0, len(records), 3):
        file.append(records[start : start + 3])
    return file


def test_what_was_written_is_found_again(path, seven):
    written(path, seven)
    assert Records(path, OPTIONS, 3, 7).found == seven
    first = json.loads(path.read_text().splitlines()[0])
    assert first["id"] == "p0"
    assert first["prompt_hash"] == "0" * 16
    assert first["responses"][1] == {
        "text": "text",
        "token_ids": [0, 1, 2],
        "finish_reason": "stop",
        "score": 0.5,
        "answer": None,
        "prm": None,
    }


def test_after_a_kill_at_any_byte_whole_chunks_are_left(path, seven):
    written(path, seven)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in {0, *ends, *(end - 1 for end in ends), *(end + 5 for end in ends[:-1])}:
        path.write_bytes(content[:cut])
        lines = sum(end <= cut for end in ends)
        kept = 7 if lines == 7 else lines // 3 * 3
        assert Records(path, OPTIONS, 3, 7).found == seven[:kept]
        assert path.read_bytes() == content[: ends[kept - 1] if kept else 0]
    path.write_bytes(content[: ends[3] + 9])
    written_on = Records(path, OPTIONS, 3, 7)
    written_on.append(seven[3:6])
    written_on.append(seven[6:])
    assert path.read_bytes() == content


def test_other_options_are_refused_with_both_values(path, seven):
    written(path, seven[:3])
    with pytest.raises(RecordsError) as refused:
        Records(path, {**OPTIONS, "temperature": 0.6}, 3, 7)
    assert "temperature: found 0.6, made with 0.3" in str(refused.value)
    assert str(path.parent) in str(refused.value)
    assert "samples" not in str(refused.value)
    assert len(Records(path, OPTIONS, 3, 7).found) == 3


def test_records_that_nobody_noted_the_options_of_are_refused(path, seven):
    written(path, seven[:3])
    path.with_suffix(".json").unlink()
    with pytest.raises(RecordsError, match="samples: found 2, made with None"):
        Records(path, OPTIONS, 3, 7)


def test_a_line_that_is_no_record_is_refused(path, seven):
    written(path, seven[:3])
    path.write_text("{}\n" * 3)
    with pytest.raises(RecordsError, match="a line is no record"):
        Records(path, OPTIONS, 3, 7)


@pytest.fixture
def numbers(make_scores):
    return [tuple(make_scores((-i, i, 0.25 * i), (-2 * i, 1.0, 0.0))) for i in range(7)]


def scored(records, numbers):
    return [Scored(record.id, pair) for record, pair in zip(records, numbers, strict=True)]


def test_prm_scores_continue_and_end_in_the_records(path, seven, numbers):
    file = written(path, seven)
    items = scored(seven, numbers)
    Scores(file, {"beta": 1}, 3).append(items[:3])
    side = path.with_suffix(".prm.jsonl")
    side.write_bytes(side.read_bytes() + b'{"id": "p3", "sco')  # killed here
    again = Scores(Records(path, OPTIONS, 3, 7), {"beta": 1}, 3)
    assert again.found == items[:3]
    assert not again.complete
    again.append(items[3:6])
    again.append(items[6:])
    again.merge()
    assert not side.exists()
    whole = Records(path, OPTIONS, 3, 7)
    assert [tuple(r.prm for r in record.responses) for record in whole.found] == numbers
    assert [record.ground_truth for record in whole.found] == ["4"] * 7
    assert Scores(whole, {"beta": 1}, 3).complete


def test_another_prm_scores_anew_and_says_so(path, seven, numbers, capsys):
    file = written(path, seven)
    scores = Scores(file, {"beta": 1}, 7)
    scores.append(scored(seven, numbers))
    scores.merge()
    again = Scores(Records(path, OPTIONS, 3, 7), {"beta": 2}, 7)
    assert "beta: found 2, made with 1" in capsys.readouterr().out
    assert not again.complete
    assert again.found == []
    again = Scores(Records(path, OPTIONS, 3, 7), {"beta": 2}, 7)  # killed before the first chunk
    assert not again.complete
    assert capsys.readouterr().out == ""
    again.append(scored(seven, numbers[::-1]))
    again.merge()
    found = Records(path, OPTIONS, 3, 7).found
    assert [tuple(r.prm for r in record.responses) for record in found] == numbers[::-1]
    assert Scores(Records(path, OPTIONS, 3, 7), {"beta": 2}, 7).complete
