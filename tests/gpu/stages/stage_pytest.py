"""Tests of pytest that need a GPU, as checks of a stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from stage_report import FAILED, OK, Check, Stage

GPU_TESTS = Path(__file__).parents[1]
ROOT = GPU_TESTS.parents[1]


def run_file(stage: Stage, name: str) -> None:
    """A row for each test of tests/gpu/`name`; skipped ones are one row for each reason."""
    results = stage.scratch / f"{name}.xml"
    results.unlink(missing_ok=True)
    limit = max(10.0, stage.left())
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", str(GPU_TESTS / name)],
        cwd=ROOT,
        stdout=sys.stderr,
        timeout=None if stage.small else limit,
        check=False,  # each failure is a row
    )
    skipped: dict[str, int] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        told = f"{name.removesuffix('.py')}: {case.get('name', '').removeprefix('test_')}"
        failure = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)  # fmt: skip # noqa: E501
        if failure is not None:
            why = (failure.get("message") or "").partition("\n")[0][:200]
            stage.add(Check(stage.name, told, "an error", "passes", FAILED, why))
        elif (skip := case.find("skipped")) is not None:
            why = skip.get("message") or ""
            skipped[why] = skipped.get(why, 0) + 1
        else:
            stage.add(Check(stage.name, told, "passes", "passes", OK))
    for why, count in skipped.items():
        stage.skip(f"{name.removesuffix('.py')}: {count} tests", "pass", why)
