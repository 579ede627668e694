"""The tool as it is called: whole runs, a kill in the middle, bounded memory, real problems."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prime.data.chat import load_tokenizer
from megatron_prime.data.prompts import load_prompts
from megatron_prime.data.sft_data import load_conversations

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
REAL = Path(os.environ.get("MEGATRON_PRIME_DATA", ROOT.parent / "shared" / "data"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load(TOOL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer's folder: the quickstart's, with all characters."""
    folder = tmp_path_factory.mktemp("model")
    make_data = load(ROOT / "examples" / "quickstart" / "make_data.py")
    make_data.write_model(folder, make_data.ALL_CHARACTERS)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}
PROBLEM = (
    "A farmer has 12 hens and buys 30 more of them at the market. How many hens are there now?"
)
HELD_OUT = (
    "Find the number of ways to place 5 rooks on a board of 6 rows so that none attacks another."
)
NUMINA = [
    {"problem": PROBLEM, "solution": r"12+30=\boxed{42}", "source": "cn_k12"},
    {"problem": PROBLEM.upper(), "solution": r"\boxed{42}", "source": "orca_math"},
    {"problem": PROBLEM.replace("at the market", "at a market"), "solution": r"\boxed{42}"},
    {"problem": PROBLEM, "solution": r"\boxed{43}", "source": "olympiads"},
    {"problem": "Prove that 2 is even.", "solution": r"\boxed{2}", "source": "olympiads"},
    {"problem": "Find x in the figure.", "solution": r"\boxed{2}", "source": "olympiads"},
    {"problem": r"The sum is \underline{ }.", "solution": r"\boxed{2}", "source": "cn_k12"},
    {"problem": "What is it?", "solution": "no box", "source": "cn_k12"},
    {"problem": "What is 7-2?", "solution": r"\boxed{5}", "answer": "6", "source": "cn_k12"},
    {"problem": "What is 1/2+1/2?", "solution": r"\boxed{\frac{2}{2}}", "answer": "1"},
    {
        "problem": "What is the sum of 2 and 3? (A) 4 (B) 5 (C) 6",
        "solution": r"\boxed{B}",
        "source": "amc_aime",
    },
    {"problem": f"{HELD_OUT} Give it as a number.", "solution": r"\boxed{720}"},
    {"problem": "Add " + "1+" * 200 + "1.", "solution": r"\boxed{201}"},
    {"problem": "Is 2 even?", "solution": r"\boxed{\text{Yes}}", "source": "cn_k12"},
]
APPS = [
    {"question": "Read a number and print the next.", "input_output": json.dumps(TESTS)},
    {"question": "Print nothing.", "input_output": "", "starter_code": ""},
    {"question": "Print it twice.", "input_output": json.dumps({"inputs": ["1"], "outputs": []})},
    {
        "question": "Add one.",
        "input_output": {"fn_name": "inc", "inputs": [[1]], "outputs": [2]},
        "starter_code": "def inc(x):",
    },
]
EURUS = {
    "data_source": "numina_aops_forum",
    "prompt": [{"role": "user", "content": "What is 9-2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "7"},
}


@pytest.fixture
def inputs(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [EURUS, {**EURUS, "reward_model": {"style": "rule", "ground_truth": None}}]
        ),
        tmp_path / "eurus.parquet",
    )
    write(tmp_path / "numina.jsonl", NUMINA)
    write(tmp_path / "apps.jsonl", APPS)
    write(tmp_path / "test.jsonl", [{"problem": HELD_OUT}])
    return [str(tmp_path / name) for name in ("eurus.parquet", "numina.jsonl", "apps.jsonl")]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_from_three_data_sets(tool, model, inputs, tmp_path, capsys, suffix):
    held, out = str(tmp_path / "test.jsonl"), tmp_path / "out"
    options = ["--eval", held, "--max-tokens", "150", "--drop-yes-no", "--suffix", suffix]
    options += ["--check-timeout", "120", "--workers", "1"]
    arguments = ["rl", "--out", str(out), "--tokenizer", str(model), *options, *inputs]
    assert tool.main(arguments) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["dropped"] == {
        "no_gold": 3,
        "tests": 1,
        "proof": 1,
        "figure": 1,
        "fill_in": 1,
        "yes_no": 1,
        "unmatched": 1,
        "contaminated": 1,
        "too_long": 1,
        "duplicate": 1,
        "conflict": 1,
        "near_duplicate": 1,
    }
    assert (report["read"], report["kept"]["train"]) == (20, 6)
    assert report["reworked"] == {"choice_to_open": 1}
    loaded = load_prompts(out / f"train{suffix}", load_tokenizer(model), "plain", 150).prompts
    assert [(p.data_source, p.ability) for p in loaded] == [
        ("numina_aops_forum", "math"),
        ("numina_cn_k12", "math"),
        ("numina", "math"),
        ("numina_amc_aime", "math"),
        ("apps", "code"),
        ("apps", "code"),
    ]
    assert [p.ground_truth for p in loaded[:4]] == ["7", "42", "1", "5"]
    assert [json.loads(p.ground_truth) for p in loaded[4:]] == [TESTS, APPS[3]["input_output"]]
    assert "| train | 6 | 30.0% | written |" in capsys.readouterr().out


def test_conversations_from_chats_and_solutions(tool, model, tmp_path, capsys):
    chat = [
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]},
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ha."}]},
        {"messages": [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "Ho."}]},
        {
            "messages": [
                {"role": "user", "content": HELD_OUT},
                {"role": "assistant", "content": "7"},
            ]
        },
    ]
    solved = [{"problem": PROBLEM, "solution": r"So \boxed{42}."}]
    paths = [str(write(tmp_path / "chat.jsonl", chat)), str(write(tmp_path / "s.jsonl", solved))]
    held, out = str(write(tmp_path / "test.jsonl", [{"problem": HELD_OUT}])), tmp_path / "out"
    arguments = ["sft", "--out", str(out), "--tokenizer", str(model), "--eval", held, *paths]
    assert tool.main(arguments) == 0, capsys.readouterr().err
    assert json.loads((out / "report.json").read_text())["dropped"] == {
        "contaminated": 1,
        "duplicate": 1,
    }
    tokenizer = load_tokenizer(model)
    learnt = [
        tokenizer.decode([t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m])
        for e in load_conversations(out / "train.jsonl", tokenizer, 4096).examples
    ]
    assert learnt == ["Ho.<eos>", "Ha.<eos>", r"So \boxed{42}.<eos>"]


def test_errors_are_told_and_leave_nothing(tool, model, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"problem": 3, "answer": "1"}])
    out = tmp_path / "out"
    base = ["rl", "--out", str(out), "--tokenizer", str(model)]
    assert tool.main([*base, str(path)]) == 1
    assert "line 1: problem: found 3" in capsys.readouterr().err
    assert tool.main([*base, str(path), str(path)]) == 1
    assert "several files named ['a.jsonl']" in capsys.readouterr().err
    assert tool.main([*base, str(tmp_path / "none.jsonl")]) == 1
    assert "no file" in capsys.readouterr().err
    out.mkdir()
    assert tool.main([*base, str(path)]) == 1
    assert "wanted a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([*base, "--validation", "1", str(path)])


def synthetic(path, count):
    """Problems that differ from one another, with an answer and much text besides."""
    rng = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrs"]
    with path.open("w") as file:
        for i in range(count):
            words = " ".join(rng.choice(syllables) + rng.choice(syllables) for _ in range(15))
            row = {"problem": f"{words} {i}?", "answer": str(i), "solution": "x" * 700}
            file.write(json.dumps(row) + "\n")
    return path


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_command_leaves_no_folder_and_the_same_one_begins_anew(model, tmp_path):
    path = synthetic(tmp_path / "a.jsonl", 2500)
    command = [sys.executable, str(TOOL), "rl", "--tokenizer", str(model), "--validation", "0.1"]
    command += ["--quiet", str(path)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, "--out", whole], env=environment(PYTHONHASHSEED="1"), check=True)
    killed = subprocess.Popen([*command, "--out", out], env=environment())
    begun = tmp_path / ".out.preparing" / "train.jsonl"
    deadline = time.monotonic() + 300
    while not (begun.exists() and begun.stat().st_size):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()
    assert begun.exists()
    subprocess.run([*command, "--out", out], env=environment(PYTHONHASHSEED="2"), check=True)
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in out.iterdir())
    assert names == ["report.json", "report.md", "train.jsonl", "validation.jsonl"]
    for name in names:
        assert (whole / name).read_bytes() == (out / name).read_bytes()
    assert not begun.parent.exists()


MEASURE = """
import runpy, sys
tool = runpy.run_path(sys.argv[1])
status = tool["main"](sys.argv[2:])
for line in open("/proc/self/status"):  # getrusage would count what its parent had at the fork
    if line.startswith("VmHWM:"):
        print("peak", line.split()[1])
sys.exit(status)
"""


def peak(model, path, out):
    """MiB that the tool's process had at most."""
    command = [sys.executable, "-c", MEASURE, str(TOOL), "rl", "--tokenizer", str(model)]
    command += ["--out", str(out), "--quiet", "--max-tokens", "2000", str(path)]
    told = subprocess.run(
        command, env=environment(), check=True, capture_output=True, text=True
    ).stdout
    return int(told.split("peak ")[1]) / 1024


@pytest.mark.slow  # 39 s of CPU time
@pytest.mark.timeout(1800)
def test_memory_grows_by_hashes_and_not_by_texts(model, tmp_path):
    few = peak(model, synthetic(tmp_path / "few.jsonl", 100), tmp_path / "few")
    path = synthetic(tmp_path / "many.jsonl", 50_000)
    assert path.stat().st_size > 39 << 20
    grown = peak(model, path, tmp_path / "many") - few
    # 800,000 keys in 2**21 slots of 12 bytes are 24 MiB, 12 more while it doubles; the texts: 39
    assert 20 < grown < 50
    kept = (tmp_path / "many" / "train.jsonl").read_text().count("\n")
    assert kept == 50_000


def real(name):
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return str(path)


@pytest.mark.timeout(900)
def test_real_problems(tool, model, tmp_path):
    """MATH-500 as a source: all golds match; against itself as an evaluation set nothing stays."""
    options = ["--tokenizer", str(model), "--max-tokens", "4000", "--check-timeout", "120"]
    out = str(tmp_path / "out")
    held = ["--eval", real("amc.jsonl"), "--eval", real("aime.jsonl"), "--eval", real("mbpp.jsonl")]
    assert tool.main(["rl", "--out", out, *options, *held, real("math500.jsonl")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["read"] == 500
    assert set(report["dropped"]) <= {"figure", "choice"}
    assert report["dropped"]["figure"] == 43
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(real("math500.jsonl")).read_bytes())
    again = ["--eval", real("math500.jsonl"), str(copy), "--out", str(tmp_path / "again")]
    assert tool.main(["rl", *options, *again]) == 1
    assert not (tmp_path / "again").exists()
