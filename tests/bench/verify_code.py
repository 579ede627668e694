"""Programs per second: the sandbox against plain interpreters, which protect from nothing.

    python tests/bench/verify_code.py

The same small programs through two workers of the pool and through two threads that start
`python -I` (and `python -I -S`, which is as little as Python can be) with a pipe each. All take
turns in one run, three times; the best of each counts. Every output is compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from table import row

from megatron_prime.types import Group, Prompt, Rollout
from megatron_prime.verify.code_tests import CodeLimits
from megatron_prime.verify.pool import VerifierPool
from megatron_prime.verify.walls import Isolation

COUNT, TURNS, WORKERS = 200, 3, 2
PROGRAM = """
import sys
from collections import Counter

def main():
    numbers = [int(word) for word in sys.stdin.read().split()]
    best, count = Counter(numbers).most_common(1)[0]
    print(best, count, sum(sorted(numbers)[:3]))

main()
"""
GIVEN, WANTED = "5 3 5 8 1 5 2\n", "5 3 6"


def groups() -> list[Group]:
    """COUNT right answers to one problem with one test."""
    truth = json.dumps({"inputs": [GIVEN], "outputs": [WANTED]})
    prompt = Prompt(0, (1,), truth, "code", "bench")
    answer = Rollout((1,), (0.0,), "stop", 0, f"```python\n{PROGRAM}```")
    return [Group(prompt, (answer,)) for _ in range(COUNT)]


def plain(*options: str) -> None:
    """COUNT interpreters, WORKERS at a time."""

    def run(_: int) -> bool:
        command = [sys.executable, *options, "-c", PROGRAM]
        done = subprocess.run(command, input=GIVEN, capture_output=True, text=True, check=True)
        return done.stdout.split() == WANTED.split()

    with ThreadPoolExecutor(WORKERS) as pool:
        assert all(pool.map(run, range(COUNT)))


def pooled(pool: VerifierPool) -> None:
    """COUNT programs through the verifier."""
    assert all(group.outcome_rewards == (1.0,) for group in pool.verify(groups()))


def main() -> None:
    """Print a row for each comparison."""
    with (
        VerifierPool(WORKERS, 60.0) as landlock,
        VerifierPool(WORKERS, 60.0, code=CodeLimits(isolation=Isolation(numpy=True))) as numpy,
    ):
        ways: dict[str, Callable[[], None]] = {
            "sandbox": lambda: pooled(landlock),
            "sandbox with numpy": lambda: pooled(numpy),
            "python -I": lambda: plain("-I"),
            "python -I -S": lambda: plain("-I", "-S"),
        }
        pooled(landlock)  # both have started
        pooled(numpy)
        rates = dict.fromkeys(ways, 0.0)
        for _ in range(TURNS):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                rates[name] = max(rates[name], COUNT / (time.perf_counter() - started))
    for ours, theirs, aim in (
        ("sandbox", "python -I", "150/s"),
        ("sandbox", "python -I -S", ""),
        ("sandbox with numpy", "python -I", ""),
    ):
        row(
            f"small programs, {ours} and `{theirs}`",
            f"{rates[ours]:.0f}/s",
            f"{rates[theirs]:.0f}/s",
            f"{rates[ours] / rates[theirs]:.2f} ×",
            aim,
            f"{WORKERS} at a time, {COUNT} programs, best of {TURNS}",
        )


if __name__ == "__main__":
    main()
