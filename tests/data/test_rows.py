import re

import pytest

from megatron_prime.data.rows import DataError, RowError, field, one_of, read_rows


def number_and_name(number, row):
    return number, field(row, "name", str)


def test_jsonl_rows_are_numbered_by_line_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "first"}\n\n  \n{"name": "fourth ∑"}')
    assert read_rows(path, number_and_name) == [(0, "first"), (3, "fourth ∑")]


def test_parquet_rows_are_numbered_over_batches(tmp_path):
    import pyarrow
    import pyarrow.parquet

    names = [f"row {i}" for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"name": names}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", number_and_name) == list(enumerate(names))


def test_all_malformed_rows_are_reported_at_once_with_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"name": "good"}\n{"name"\n[1]\n{"name": 5}\n\n{}\n{"name": ""}\n"\xff"\n')
    with pytest.raises(DataError) as error:
        read_rows(path, number_and_name)
    title, *problems = str(error.value).splitlines()
    assert title == f"{path}: malformed rows: 6"
    assert [re.match(r"  line (\d)", line)[1] for line in problems] == [
        "2",
        "3",
        "4",
        "6",
        "7",
        "8",
    ]
    assert "wanted a JSON object" in problems[0]
    assert "found [1], wanted a JSON object" in problems[1]
    assert "name: found 5, wanted a non-empty str" in problems[2]
    assert "name: found nothing, wanted a non-empty str" in problems[3]
    assert "name: found '', wanted a non-empty str" in problems[4]


def test_twenty_problems_are_shown_and_the_others_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 33)
    with pytest.raises(DataError) as error:
        read_rows(path, number_and_name)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[0].endswith("33")
    assert lines[-1] == "  … and 13 more"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no file .*none.jsonl"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.csv", "name\n", "found the suffix '.csv', wanted .jsonl or .parquet"),
        ("a.parquet", "no parquet", "is not a readable parquet file"),
    ],
)
def test_files_without_rows(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, number_and_name)


def test_one_of_compares_with_the_choices():
    assert one_of({"a": "x"}, "a", ("x", "y")) == "x"
    for wrong in ("z", ["x"], None):
        with pytest.raises(RowError, match="wanted 'x' or 'y'"):
            one_of({"a": wrong}, "a", ("x", "y"))
