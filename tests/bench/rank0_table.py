"""What rank0_step.py found: the stages' seconds, as a table and as parts of a predicted step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from measure import resident
from rank0_given import predicted

RUNS = {2: "qwen2.5-math-7b_8gpu", 8: "llama3.1-70b_64gpu"}  # by their servers
ONCE, IF_ASKED = "(once) tokenizing prompts", "(if asked for) rollout files"
BESIDE = ("HTTP, JSON, checks", "decoding", "verifying (dispatch)")  # while servers generate
WORKERS = 4  # as in the examples


@dataclass
class Stages:
    """Seconds of each stage: of the process, and by the clock; the median of all repeats."""

    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)
    workers: float = 0.0  # CPU seconds of the verifier's
    checks: int = 0  # that they made in them
    pickled: int = 0  # bytes of one server's groups
    mean_response: float = 0.0  # tokens
    load: float = 0.0  # of the machine, when it began

    def measure(self, name: str, repeat: int, work: Callable[[], Any]) -> Any:
        """Do it; the last result."""
        found, cpu, wall = None, [], []
        for _ in range(repeat):
            found = None
            began, clock = time.process_time(), time.perf_counter()
            found = work()
            cpu.append(time.process_time() - began)
            wall.append(time.perf_counter() - clock)
        self.cpu[name], self.wall[name] = median(cpu), median(wall)
        return found

    def sums(self) -> dict[str, tuple[float, float]]:
        """CPU seconds and time by the clock of what each step has."""
        waiting = [name for name in self.cpu if name not in (ONCE, IF_ASKED, *BESIDE)]
        return {
            f"each step, while {what}": (
                sum(self.cpu[name] for name in names),
                sum(self.wall[name] for name in names),
            )
            for what, names in (("servers generate", BESIDE), ("GPUs wait", waiting))
        }


def show(found: dict[int, Stages], response: int) -> None:
    """The table; then what it is of the steps that the planner predicts."""
    runs = [f"{RUNS[servers]}: CPU s | by the clock" for servers in found]
    print(f"| | {' | '.join(runs)} |")
    print("|---" * (1 + 2 * len(found)) + "|")
    for name in next(iter(found.values())).cpu:
        cells = [f"{one.cpu[name]:.2f} | {one.wall[name]:.2f}" for one in found.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    for what in next(iter(found.values())).sums():
        sums = [one.sums()[what] for one in found.values()]
        cells = [f"**{cpu:.2f}** | **{wall:.2f}**" for cpu, wall in sums]
        print(f"| **{what}** | {' | '.join(cells)} |")
    print(f"| verifier's workers | {' | '.join(f'{x.workers:.2f} | ' for x in found.values())} |")
    print(f"\nresident at the peak: {resident('VmHWM') / 2**30:.2f} GiB")
    for servers, one in found.items():
        with tempfile.TemporaryDirectory() as folder:
            step = predicted(RUNS[servers], Path(folder), response)
        generate = step.of("generate")
        assert generate is not None
        cpu = [seconds for seconds, _ in one.sums().values()]
        beside, waiting = (f"{part / step.seconds:.1%}" for part in cpu)
        a_check = WORKERS * generate.seconds / one.checks
        print(
            f"\n{RUNS[servers]}: responses of {one.mean_response:.0f} tokens on average, "
            f"load {one.load:.1f} at the start\n"
            f"  rank 0: {sum(cpu):.2f} CPU s, {sum(cpu) / step.seconds:.1%} of the predicted "
            f"{step.seconds:.1f} s ({beside} while servers generate, {waiting} while GPUs wait)\n"
            f"  workers: {one.checks} checks, {one.workers / one.checks * 1000:.1f} CPU ms each; "
            f"they outlast the predicted {generate.seconds:.1f} s of generation if a check takes "
            f"more than {a_check:.2f} s on average\n"
            f"  groups of one server, pickled: {one.pickled / 1e6:.0f} MB"
        )
