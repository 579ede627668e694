"""What a stage reports: a line per check while it runs, a JSON file that is whole at any moment.

A check is ok, FAILED, skipped with the reason, or only measured (no bound is set for it). Nothing
is reported that was not measured: a figure that means something on a GPU alone is computed on a CPU
as well, so that its code runs there, and then thrown away.

A stage has a time budget. It is made of parts; a part that fails is a failed check and the next one
begins, one for which too little time is left is skipped. The driver (run_stages.py) kills a stage
that overstays, and finds in the JSON file what it had got by then.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

OK, FAILED, SKIPPED, MEASURED = "ok", "FAILED", "skipped", "measured"
NO_CUDA = "no CUDA device"
COLUMNS = ("stage", "check", "found", "wanted", "verdict")
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer_engine",
    "transformer_engine_torch",
    "sglang",
    "sglang-kernel",
    "flash-attn",
    "apex",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    stage: str
    name: str
    found: str
    wanted: str
    verdict: str
    why: str = ""

    def line(self) -> str:
        """What is printed when it is known."""
        wanted = f", wanted {self.wanted}" if self.wanted else ""
        why = f": {self.why}" if self.why else ""
        return f"{self.stage}: {self.name}: {self.found}{wanted}: {self.verdict}{why}"

    def row(self) -> str:
        """The same as a row of the table."""
        verdict = f"{self.verdict}: {self.why}" if self.why else self.verdict
        cells = (self.stage, self.name, self.found, self.wanted, verdict)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


class Stage:
    """Collects checks of one stage."""

    def __init__(self, name: str, folder: Path, seconds: float, small: bool, short: bool) -> None:
        self.name, self.folder, self.seconds = name, folder, seconds
        self.small, self.short = small, short
        self.on_gpu = torch.cuda.is_available()
        self.checks: list[Check] = []
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)

    @classmethod
    def of_arguments(cls, name: str, arguments: list[str] | None = None) -> Stage:
        """As the driver starts it."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
        parser.add_argument("--seconds", type=float, default=600.0)
        parser.add_argument("--small", action="store_true")
        parser.add_argument("--short", action="store_true")
        known = parser.parse_args(arguments)
        stage = cls(name, known.out.resolve(), known.seconds, known.small, known.short)
        if not stage.on_gpu and not known.small:
            raise SystemExit("there is no CUDA device; --small runs these stages on a CPU")
        return stage

    @property
    def scratch(self) -> Path:
        """Models and runs, which the driver removes in the end."""
        return self.folder / "scratch"

    def left(self) -> float:
        """Seconds of the budget."""
        return self.seconds - (time.monotonic() - self._started)

    # ------------------------------------------------------------------ checks

    def check(self, name: str, found: object, wanted: str, ok: bool, why: str = "") -> None:
        """A figure with a bound."""
        self.add(Check(self.name, name, str(found), wanted, OK if ok else FAILED, why))

    def at_most(self, name: str, found: float, most: float, unit: str = "") -> None:
        """`found` should not be larger."""
        self.check(name, _number(found, unit), f"≤ {_number(most, unit)}", found <= most)

    def at_least(self, name: str, found: float, least: float, unit: str = "") -> None:
        """`found` should not be smaller."""
        self.check(name, _number(found, unit), f"≥ {_number(least, unit)}", found >= least)

    def on_cuda(
        self, name: str, found: float, unit: str = "", least: float | None = None,
        most: float | None = None,
    ) -> None:  # fmt: skip
        """A figure that says something about a GPU only; on a CPU it is not told."""
        bound = f"≥ {_number(least, unit)}" if least is not None else ""
        bound += f"≤ {_number(most, unit)}" if most is not None else ""
        if not self.on_gpu:
            self.skip(name, bound, NO_CUDA)
        elif not bound:
            self.measured(name, found, unit)
        else:
            ok = (least is None or found >= least) and (most is None or found <= most)
            self.check(name, _number(found, unit), bound, ok)

    def measured(self, name: str, found: float | str, unit: str = "") -> None:
        """A figure without a bound."""
        text = found if isinstance(found, str) else _number(found, unit)
        self.add(Check(self.name, name, text, "", MEASURED))

    def skip(self, name: str, wanted: str, why: str) -> None:
        """What can't be looked at here."""
        self.add(Check(self.name, name, "not measured", wanted, SKIPPED, why))

    def add(self, check: Check) -> None:
        """Print and keep it."""
        self.checks.append(check)
        print(check.line(), flush=True)
        self._write()

    # ------------------------------------------------------------------ parts

    def part(self, name: str, needs_s: float, work: Callable[..., None], *given: Any) -> None:
        """Do `work(self, *given)` if there is time for it; what it raises fails the check `name`.

        `needs_s`: seconds on one Hopper GPU. Whatever the part has left is put away.
        """
        if not self.small and self.left() < needs_s:
            why = f"{self.left():.0f} s are left of {self.seconds:.0f}, it needs {needs_s:.0f}"
            self.skip(name, "", why)
            return
        try:
            self.attempt(name, work, self, *given)
        finally:
            put_away()

    def attempt(self, name: str, work: Callable[..., None], *given: Any) -> bool:
        """`work(*given)`; whether it came to its end. What it raises fails the check `name`."""
        try:
            work(*given)
        except Exception as error:  # whatever it is: a row of the table, and the next part
            traceback.print_exc()
            last = str(error).strip().splitlines() or [""]
            told = f"{type(error).__name__}: {last[0]}"[:200]
            self.add(Check(self.name, name, "an error", "none", FAILED, told))
            return False
        return True

    def _write(self) -> None:
        report = {
            "stage": self.name,
            "date": str(date.today()),
            "command": " ".join(sys.argv),
            "chip": chip(),
            "versions": versions(),
            "seconds": round(time.monotonic() - self._started, 1),
            "checks": [asdict(check) for check in self.checks],
        }
        file = self.folder / f"{self.name}.json"
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps(report, indent=1) + "\n")
        draft.replace(file)

    def finish(self) -> int:
        """The exit status."""
        print(f"{self.name}: {self.seconds - self.left():.1f} s", flush=True)
        return int(any(check.verdict == FAILED for check in self.checks))


def put_away() -> None:
    """End process groups that an error has left, and give memory back."""
    if torch.distributed.is_initialized():
        from megatron_prime.runtime.distributed import destroy

        destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def chip() -> str:
    """What the stage ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Of the packages that matter, as far as they are there."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # said by its absence
            continue
    return found


def table(checks: Iterable[Check]) -> str:
    """All rows, Markdown."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(check.row() for check in checks)])


def read(file: Path) -> list[Check]:
    """The checks of a stage's JSON file; none if it never wrote one."""
    if not file.exists():
        return []
    return [Check(**check) for check in json.loads(file.read_text())["checks"]]


def _number(value: float, unit: str) -> str:
    text = f"{value:.1%}" if unit == "%" else f"{value:.4g}"
    return f"{text} {unit}" if unit and unit != "%" else text
