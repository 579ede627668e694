"""Math checks: ours against math-verify alone, in one run. Prints two Markdown tables.

Speed: groups of four answers to problems of MATH-500 and AIME (one right, as the reference solution
boxes it, three from other problems), in two processes of each kind, which take turns, so that
whatever else the machine does meets both alike. Beside the clock stands the CPU time, which other
programs disturb less. Without the data (../shared/data) the pairs of tests/verify stand in.

Right and wrong: the pairs of tests/verify by class, of which the held-out half was written before
the verifier and never tuned on. math-verify has its own defaults.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
DATA = next(
    (up / "shared" / "data" for up in ROOT.parents if (up / "shared" / "data").exists()), None
)
Check = tuple[str, str]  # the answer in its box, the gold
PROCESSES = 2


def ours(answer: str, gold: str) -> bool:
    """This project's verifier."""
    from megatron_prime.verify.math_answer import grade

    return grade(rf"\boxed{{{answer}}}", gold) == 1.0


def library(answer: str, gold: str) -> bool:
    """math-verify, as its documentation uses it."""
    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")))


GRADERS: dict[str, Callable[[str, str], bool]] = {"ours": ours, "math-verify": library}


def pairs() -> list[tuple[str, bool, str, str]]:
    """Class, right or wrong, gold, answer."""
    found = []
    for name in ("math_pairs.txt", "math_pairs_held_out.txt", "math_pairs_review.txt"):
        for line in (ROOT / "tests" / "verify" / name).read_text().splitlines():
            if line and not line.startswith("#"):
                kind, sign, gold, answer = (field.strip() for field in line.split("¦"))
                found.append((kind, sign == "+", gold, answer))
    return found


def ordinary_checks(problems: int) -> list[Check]:
    """Groups of four."""
    from megatron_prime.verify.math_answer import boxed_answer

    draw = random.Random(0)
    if DATA is None:
        solved = [(answer, gold) for _, right, gold, answer in pairs() if right]
    else:
        lines = [
            json.loads(line)
            for name in ("math500", "aime")
            for line in (DATA / f"{name}.jsonl").read_text().splitlines()
        ]
        solved = [(boxed_answer(row["solution"]) or "", row["answer"]) for row in lines]
    chosen = draw.sample(solved, min(problems, len(solved)))
    return [
        (answer, gold)
        for right, gold in chosen
        for answer in (right, *(other for other, _ in draw.sample(solved, 3)))
    ]


def work(grader: str, checks: list[Check]) -> tuple[float, float, int]:
    """Seconds, seconds of CPU time and accepts of a list of checks."""
    started, cpu = time.perf_counter(), time.process_time()
    accepts = sum(GRADERS[grader](*check) for check in checks)
    return time.perf_counter() - started, time.process_time() - cpu, accepts


def speed(problems: int, rounds: int) -> None:
    """Print the first table."""
    checks = ordinary_checks(problems)
    halves = [checks[turn::PROCESSES] for turn in range(PROCESSES)]
    pools = {
        name: ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) for name in GRADERS
    }
    wall: dict[str, list[float]] = {name: [] for name in GRADERS}
    cpu: dict[str, list[float]] = {name: [] for name in GRADERS}
    for turn in range(rounds + 1):
        for name, pool in pools.items():
            started = time.perf_counter()
            done = list(pool.map(work, [name] * PROCESSES, halves))
            if turn:  # the first is for imports
                wall[name].append(len(checks) / (time.perf_counter() - started))
                cpu[name].append(len(checks) / sum(used for _, used, _ in done))
    for pool in pools.values():
        pool.shutdown()
    print(f"{len(checks)} checks, median of {rounds} rounds on {PROCESSES} processes\n")
    print("| | checks/s | checks per second of CPU time | times math-verify (CPU time) |")
    print("|---|---|---|---|")
    for name in GRADERS:
        ratio = median(a / b for a, b in zip(cpu[name], cpu["math-verify"], strict=True))
        print(f"| {name} | {median(wall[name]):.0f} | {median(cpu[name]):.0f} | {ratio:.1f} |")


def right_and_wrong() -> None:
    """Print the second table."""
    counts: dict[str, Counter[str]] = {}
    for kind, right, gold, answer in pairs():
        row = counts.setdefault(kind, Counter())
        row["right" if right else "wrong"] += 1
        for name, grader in GRADERS.items():
            if grader(answer, gold) != right:
                row[f"{name} {'reject' if right else 'accept'}"] += 1
    total = sum(counts.values(), Counter())
    print("\n| class | pairs | ours: wrong accepts | rejects | math-verify: accepts | rejects |")
    print("|---|---|---|---|---|---|")
    for kind, row in [*counts.items(), ("all", total)]:
        cells = [row[f"{name} {what}"] for name in GRADERS for what in ("accept", "reject")]
        shown = " | ".join(str(cell) for cell in cells)
        print(f"| {kind} | {row['wrong']} wrong, {row['right']} right | {shown} |")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    speed(options.problems, options.rounds)
    right_and_wrong()


if __name__ == "__main__":
    main()
