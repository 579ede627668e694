"""Runs the stages of tests/gpu/stages one after the other, each a process with a time limit.

A stage that fails, crashes or hangs does not keep the next one from running: it is killed at its
limit with all it has started, and what its JSON file has by then counts. At the end there is one
table, in DIR/table.md as well; the exit status is 1 if any check failed.

Budgets are shares of what is left of `--seconds`, in the proportions of SHARES, among the stages
that were asked for: what one does not use, the later ones have. A stage begins no part for which
too little of its budget is left, so the limit, a little above the budget, is for what hangs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE / "stages"), str(ROOT)]

from stage_report import FAILED, Check, read, table  # noqa: E402

# Of a whole run; what they need of one Hopper GPU relative to each other.
SHARES = {"models": 30, "fp8": 95, "engine": 110, "colocation": 80, "speed": 85, "learning": 80}
SHORT_S = 480.0  # a command on a machine without a network may be limited to ten minutes
LONG_S = 2400.0
SMALL_S = 7200.0  # on a CPU: as long as it takes
LATE_SHARE, LATE_S = 0.05, 5.0  # what a stage may overstay its budget by


def main(arguments: list[str] | None = None) -> int:
    """Run them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", nargs="+", choices=[*SHARES], default=[*SHARES])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder")
    parser.add_argument("--seconds", type=float, help="of all stages together")
    parser.add_argument("--short", action="store_true", help="under eight minutes")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--keep", action="store_true", help="keep models and runs")
    known = parser.parse_args(arguments)
    out = known.out.resolve()
    total = known.seconds or (SMALL_S if known.small else SHORT_S if known.short else LONG_S)
    started = time.monotonic()
    checks: list[Check] = []
    for number, name in enumerate(known.stage):
        of_rest = sum(SHARES[later] for later in known.stage[number:])
        budget = (total - (time.monotonic() - started)) * SHARES[name] / of_rest
        flags = [flag for flag in ("--small", "--short") if getattr(known, flag[2:])]
        checks += run(name, out, budget, flags)
    print(f"\n{table(checks)}", flush=True)
    (out / "table.md").write_text(table(checks) + "\n")
    if not known.keep:
        shutil.rmtree(out / "scratch", ignore_errors=True)
    failed = sum(check.verdict == FAILED for check in checks)
    counts = {check.verdict: 0 for check in checks}
    for check in checks:
        counts[check.verdict] += 1
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return int(failed > 0)


def run(name: str, out: Path, budget: float, flags: list[str]) -> list[Check]:
    """One stage; its checks, and one more if it did not come to its end."""
    out.mkdir(parents=True, exist_ok=True)
    report, log = out / f"{name}.json", out / f"{name}.log"
    report.unlink(missing_ok=True)
    script = HERE / "stages" / f"stage_{name}.py"
    command = [sys.executable, str(script), "--out", str(out), "--seconds", str(budget), *flags]
    limit = budget * (1 - LATE_SHARE) - LATE_S
    command[command.index("--seconds") + 1] = f"{max(1.0, limit):.1f}"
    started = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stderr=errors, start_new_session=True
        )
        try:
            code: int | str = process.wait(budget)
        except subprocess.TimeoutExpired:
            code = f"killed after {time.monotonic() - started:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    checks = read(report)
    if code == 0 or (code == 1 and any(check.verdict == FAILED for check in checks)):
        return checks
    tail = log.read_text(errors="replace").strip().splitlines()[-15:]
    print("\n".join([f"{name}: {code}; {log} ends with", *tail]), flush=True)
    ended = Check(name, "the stage came to its end", f"exit status {code}", "0", FAILED)
    print(ended.line(), flush=True)
    return [*checks, ended]


def environment() -> dict[str, str]:
    """This one's, with the places that stages import from."""
    places = [ROOT, HERE, HERE / "stages", ROOT / "tests" / "bench", ROOT / "examples/quickstart"]
    found = [*map(str, places), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(filter(None, found)), "HF_HUB_OFFLINE": "1"}
    if Path("/sys/class/net/lo").exists():
        given["GLOO_SOCKET_IFNAME"] = "lo"
    # Megatron wants one queue, so that copies and products begin in the order they were asked for.
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, **given}


if __name__ == "__main__":
    sys.exit(main())
