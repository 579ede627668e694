import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_prime.data.rows import read_rows
from megatron_prime.prepare.output import OutputError, new_folder, open_rows, write_text

ROOT = Path(__file__).parents[2]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as work:
        write_text(work / "a.txt", "ä")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "a.txt").read_text(encoding="utf-8") == "ä"


def test_an_error_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as work:
            write_text(work / "a.txt", "a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_is_no_part_of_the_next(tmp_path):
    left = tmp_path / ".out.preparing"
    left.mkdir()
    (left / "train.jsonl").write_text("half a ro")
    with new_folder(tmp_path / "out") as work:
        assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_untouched(tmp_path):
    (tmp_path / "kept").write_text("a")
    with pytest.raises(OutputError, match="wanted a new folder; give another --out"):
        new_folder(tmp_path).__enter__()
    assert (tmp_path / "kept").read_text() == "a"


def test_two_at_the_same_time_are_refused(tmp_path):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from megatron_prime.prepare.output import OutputError, new_folder
        try:
            with new_folder(Path(sys.argv[1])):
                print("in")
        except OutputError as error:
            print(error)
    """)
    with new_folder(tmp_path / "out") as work:
        write_text(work / "a.txt", "a")
        told = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "out")],
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert "found another process that writes" in told
    assert (tmp_path / "out" / "a.txt").read_text() == "a"


def prompt(i):
    return {
        "data_source": "s",
        "prompt": [{"role": "user", "content": f"π q {i}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"split": "train", "index": i, "file": "f"},
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_come_back_as_they_were(tmp_path, suffix):
    rows = [prompt(i) for i in range(1, 2501)]
    file = open_rows(tmp_path / f"a{suffix}")
    for row in rows:
        file.write(row)
    file.close()
    assert read_rows(tmp_path / f"a{suffix}", lambda number, row: row) == rows


def test_parquet_of_conversations_and_of_nothing(tmp_path):
    import pyarrow.parquet

    row = {
        "data_source": "s",
        "messages": [{"role": "assistant", "content": "a"}],
        "extra_info": {"split": "train", "index": 0, "file": "f"},
    }
    file = open_rows(tmp_path / "a.parquet")
    file.write(row)
    file.close()
    assert read_rows(tmp_path / "a.parquet", lambda number, row: row) == [row]
    open_rows(tmp_path / "empty.parquet").close()
    assert pyarrow.parquet.read_table(tmp_path / "empty.parquet").num_rows == 0


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"'.csv', wanted .jsonl or .parquet"):
        open_rows(tmp_path / "a.csv")
