"""The stages themselves: what they report, that none keeps another from running, and on a CPU the
code of all of them with tiny shapes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

GPU = Path(__file__).parent
ROOT = GPU.parents[1]
sys.path[:0] = [str(GPU), str(GPU / "stages")]

import run_stages  # noqa: E402
from stage_report import FAILED, MEASURED, OK, SKIPPED, Check, Stage, read, table  # noqa: E402

pytestmark = pytest.mark.long

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's rows")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("engine", tmp_path, seconds=60.0, small=True, short=False)


class TestReport:
    def test_bounds_by_value(self, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
        stage.at_most("error", 0.5, 0.5, "nats")
        stage.at_most("error", 0.51, 0.5, "nats")
        stage.at_least("share", 0.449, 0.45, "%")
        assert [check.verdict for check in stage.checks] == [OK, FAILED, FAILED]
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "engine: error: 0.5 nats, wanted ≤ 0.5 nats: ok"
        assert said[2] == "engine: share: 44.9%, wanted ≥ 45.0%: FAILED"
        assert stage.finish() == 1

    def test_nan_is_never_well(self, stage: Stage) -> None:
        stage.at_most("error", float("nan"), 1.0)
        stage.at_least("rate", float("nan"), 0.0)
        assert [check.verdict for check in stage.checks] == [FAILED, FAILED]

    @no_cuda
    def test_a_figure_of_a_gpu_is_not_told_on_a_cpu(self, stage: Stage) -> None:
        stage.on_cuda("bandwidth", 123.0, "GB/s", least=1.0)
        stage.on_cuda("seconds", 123.0, "s")
        for check in stage.checks:
            assert (check.found, check.verdict, check.why) == (
                "not measured",
                SKIPPED,
                "no CUDA device",
            )
        assert stage.finish() == 0, "a skip is no failure"

    def test_a_figure_of_a_gpu_is_judged_on_one(self, stage: Stage) -> None:
        stage.on_gpu = True
        stage.on_cuda("speed", 0.49, "%", least=0.5)
        stage.on_cuda("growth", 3.0, "MiB", most=3.0)
        stage.on_cuda("seconds", 2.0, "s")
        assert [check.verdict for check in stage.checks] == [FAILED, OK, MEASURED]

    def test_a_part_that_fails_is_a_row_and_the_next_one_runs(self, stage: Stage) -> None:
        def broken(stage: Stage) -> None:
            stage.check("first", 1, "1", True)
            raise RuntimeError("out of luck\nsecond line")

        stage.part("broken", 1, broken)
        stage.part("well", 1, lambda stage: stage.check("second", 2, "2", True))
        assert [check.verdict for check in stage.checks] == [OK, FAILED, OK]
        assert stage.checks[1].why == "RuntimeError: out of luck"

    def test_without_time_a_part_is_skipped(self, tmp_path: Path) -> None:
        stage = Stage("speed", tmp_path, seconds=5.0, small=False, short=True)
        stage.part("long", 6, lambda stage: pytest.fail("it ran"))
        stage.part("short", 1, lambda stage: stage.check("it", "ran", "", True))
        assert [check.verdict for check in stage.checks] == [SKIPPED, OK]

    def test_the_file_is_whole_after_each_check(self, stage: Stage, tmp_path: Path) -> None:
        stage.check("first", 1, "1", True)
        assert read(tmp_path / "engine.json") == stage.checks
        stage.skip("second", "", "why not")
        assert read(tmp_path / "engine.json") == stage.checks
        assert json.loads((tmp_path / "engine.json").read_text())["versions"]["torch"]

    def test_a_bar_in_a_cell_ends_no_cell(self) -> None:
        rows = table([Check("models", "a|b", "1", "2", OK)]).splitlines()
        assert len(rows) == 3
        assert all(row.count("|") == 6 for row in rows)

    @no_cuda
    def test_a_cpu_wants_small(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="--small"):
            Stage.of_arguments("models", ["--out", str(tmp_path)])


REPORT = """
import json, os, pathlib, signal, subprocess, sys, time

def report(name, found, verdict):
    check = dict(stage=NAME, name=name, found=found, wanted="1", verdict=verdict)
    pathlib.Path(OUT, NAME + ".json").write_text(json.dumps({"checks": [check]}))
"""
STAGES = {
    "models": "report('a', '2', 'FAILED'); sys.exit(1)",
    "fp8": "os.kill(os.getpid(), signal.SIGKILL)",
    "engine": "report('before it hangs', '1', 'ok')\n"
    "child = subprocess.Popen(['sleep', '300'])\n"
    "pathlib.Path(OUT, 'child').write_text(str(child.pid))\ntime.sleep(300)",
    "learning": "report('z', '1', 'ok')",
}


@pytest.mark.timeout(600)
def test_stages_that_fail_crash_and_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None keeps the next from running, and none leaves a process."""
    home, out = tmp_path / "gpu", tmp_path / "out"
    (home / "stages").mkdir(parents=True)
    for name, text in STAGES.items():
        told = f"OUT, NAME = {str(out)!r}, {name!r}\n{REPORT}\n{text}\n"
        (home / "stages" / f"stage_{name}.py").write_text(told)
    monkeypatch.setattr(run_stages, "HERE", home)
    monkeypatch.setattr(run_stages, "SHARES", dict.fromkeys(STAGES, 60) | {"engine": 3})
    given = ["--small", "--seconds", "188", "--out", str(out), "--stage", *STAGES]
    started = time.monotonic()
    assert run_stages.main(given) == 1
    assert time.monotonic() - started >= 8, "engine had its whole budget"
    said = capsys.readouterr().out
    rows = [row.split(" | ") for row in said.splitlines() if row.startswith(("| m", "| f", "| e", "| l"))]  # fmt: skip # noqa: E501
    found = [(row[0].strip("| "), row[1], row[-1].strip(" |")) for row in rows]
    end = "the stage came to its end"
    assert found == [
        ("models", "a", FAILED),
        ("fp8", end, FAILED),
        ("engine", "before it hangs", OK),
        ("engine", end, FAILED),
        ("learning", "z", OK),
    ]
    assert "killed after" in said
    assert (out / "table.md").read_text().count("\n") == 7
    child = int((out / "child").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def small(stage: str, folder: Path) -> list[Check]:
    """The real stage on a CPU; AssertionError with its output if it fails."""
    done = subprocess.run(
        [sys.executable, GPU / "run_stages.py", "--small", "--out", folder, "--stage", stage],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    log = folder / f"{stage}.log"
    told = log.read_text()[-3000:] if log.exists() else done.stderr
    assert done.returncode == 0, done.stdout + told
    assert not (folder / "scratch").exists()
    return read(folder / f"{stage}.json")


@pytest.mark.sglang
def test_a_gpus_options_are_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are given on a GPU only; a name that SGLang does not have would end the server there."""
    python = os.environ.get("SGLANG_PYTHON")
    if not python:
        pytest.skip("SGLANG_PYTHON is not set: no SGLang; tools/venv.sh installs it")
    sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "examples" / "quickstart")]
    import stage_sizes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stage_sizes, "sglang_has", dict)
    options = stage_sizes.sglang_options()
    assert options["attention_backend"] == "triton"
    told = subprocess.run(
        [python, "-c", "from importlib.util import find_spec; print(find_spec('sglang').origin)"],
        capture_output=True,
        text=True,
        check=True,
    )
    source = Path(told.stdout.strip()).parent / "srt" / "server_args.py"
    (theirs,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"
    )
    names = {ast.unparse(node.target) for node in theirs.body if isinstance(node, ast.AnnAssign)}
    assert "max_total_tokens" in names
    assert options.keys() <= names


@no_cuda
@pytest.mark.timeout(600)
def test_models_on_a_cpu(tmp_path: Path) -> None:
    found = {check.name: check.verdict for check in small("models", tmp_path)}
    assert found.pop("Transformer Engine's layers") == SKIPPED
    assert sum(verdict == OK for verdict in found.values()) >= 8


@no_cuda
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("stage", "least"),
    [("fp8", 2), ("engine", 9), ("colocation", 4), ("speed", 0), ("learning", 1)],
)
def test_the_others_on_a_cpu(stage: str, least: int, tmp_path: Path) -> None:
    """Those that start servers or runs; `least`: checks that a CPU can tell."""
    if stage in ("engine", "colocation", "speed") and not os.environ.get("SGLANG_PYTHON"):
        pytest.skip("SGLANG_PYTHON is not set: no SGLang; tools/venv.sh installs it")
    found = small(stage, tmp_path)
    assert sum(check.verdict == OK for check in found) >= least
    assert any(check.verdict == SKIPPED for check in found), "of what only a GPU can tell"
