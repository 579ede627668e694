"""A whole training step: outcome-only RLOO and PRIME here, RLOO in TRL.

    python tests/bench/rloo_step.py FOLDER [--turns N] [--only NAME …] [--section.key=value …]

64 prompts × 4 responses × 64 tokens, one optimizer step; FOLDER is model.py's. Overrides go to
megatron_prime's configuration.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from table import faster, seconds
from turns import Contestant, take_turns

HERE = Path(__file__).parent
TOKENS = 64 * 4 * 64
OURS = {"rloo": "RLOO", "prime": "PRIME"}


def main(arguments: list[str] | None = None) -> None:
    """Print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["rloo", "prime", "trl"])
    known, overrides = parser.parse_known_args(arguments)
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(name, command(name, known.folder, overrides)))
            for name in known.only
        }
        take_turns(list(contestants.values()), known.warm_up, known.turns)
    if {"rloo", "trl"} <= contestants.keys():
        trl, rloo = contestants["trl"], contestants["rloo"]
        faster("RLOO step against TRL's", rloo.median, trl.median, "≥ 1.3 ×", steps(rloo, trl))
    if {"prime", "trl"} <= contestants.keys():
        trl, prime = contestants["trl"], contestants["prime"]
        faster(
            "PRIME step against TRL's RLOO", prime.median, trl.median, "≥ 1 ×", steps(prime, trl)
        )
    if {"prime", "rloo"} <= contestants.keys():
        rloo, prime = contestants["rloo"], contestants["prime"]
        faster("PRIME step against RLOO here", prime.median, rloo.median, "", steps(prime, rloo))


def command(name: str, folder: Path, overrides: list[str]) -> list[str]:
    """How to start a contestant."""
    if name == "trl":
        return [sys.executable, str(HERE / "rloo_trl.py"), str(folder)]
    return [sys.executable, str(HERE / "rloo_ours.py"), str(folder), name, *overrides]


def steps(ours: Contestant, theirs: Contestant) -> str:
    """Where the time of our step goes, and tokens per second of both."""
    phases = sorted(key for key in ours.details[0] if key.startswith("time/") and "step" not in key)
    parts = ", ".join(f"{phase[5:-2]} {seconds(ours.detail(phase))}" for phase in phases)
    rates = " against ".join(f"{TOKENS / side.median:.0f}" for side in (ours, theirs))
    return f"{parts}; {rates} response tokens/s"


if __name__ == "__main__":
    main()
