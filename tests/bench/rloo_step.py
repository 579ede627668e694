"""A whole training step: outcome-only RLOO and PRIME here, RLOO in TRL.

    python tests/bench/rloo_step.py FOLDER [--turns N] [--section.key=value …]

64 prompts × 4 responses × 64 tokens, one optimizer step; FOLDER is model.py's. Each contestant has
two cores, as one rank of two threads and as two ranks of one: what counts is its better layout, and
the remarks give both. Overrides go to megatron_prime's configuration.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from table import faster, seconds
from turns import Contestant, take_turns

HERE = Path(__file__).parent
TOKENS = 64 * 4 * 64
CORES = 2
SCRIPTS = {
    "rloo": ("rloo_ours.py", ["rloo"]),
    "prime": ("rloo_ours.py", ["prime"]),
    "trl": ("rloo_trl.py", []),
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="layouts to try")
    known, overrides = parser.parse_known_args(arguments)
    with ExitStack() as stack:
        sides = {
            name: [
                stack.enter_context(contestant(name, known.folder, ranks, overrides))
                for ranks in known.ranks
            ]
            for name in SCRIPTS
        }
        everyone = [one for side in sides.values() for one in side]
        take_turns(everyone, known.warm_up, known.turns)
    for what, ours, theirs, aim in (
        ("RLOO step against TRL's", "rloo", "trl", "≥ 1.3 ×"),
        ("PRIME step against TRL's RLOO", "prime", "trl", "≥ 1 ×"),
    ):
        best = [min(sides[name], key=lambda one: one.median) for name in (ours, theirs)]
        layouts = [
            ", ".join(f"{one.name} {seconds(one.median)}" for one in sides[name])
            for name in (ours, theirs)
        ]
        remarks = f"{steps(*best)}; {'; against '.join(layouts)}"
        faster(what, *(one.median for one in best), aim, remarks)


def contestant(name: str, folder: Path, ranks: int, overrides: list[str]) -> Contestant:
    """Start one: `rloo` and `prime` are ours, `trl` is TRL's RLOO."""
    script, kind = SCRIPTS[name]
    extra = [] if name == "trl" else overrides
    layout = f"{ranks} × {CORES // ranks}"
    return Contestant(layout, HERE / script, [folder, *kind, *extra], ranks, CORES // ranks)


def steps(ours: Contestant, theirs: Contestant) -> str:
    """Where the time of our step goes, and tokens per second of both."""
    rates = " against ".join(f"{TOKENS / side.median:.0f}" for side in (ours, theirs))
    return f"{phases(ours)}; {rates} response tokens/s"


def phases(side: Contestant) -> str:
    """Median seconds of every phase, and of the switches between them."""
    of_parts = ("time/step", "time/busy", "time/idle")  # of phases, and their sum
    names = [k for k in side.details[0] if k.startswith("time/") and not k.startswith(of_parts)]
    return ", ".join(f"{name[5:-2]} {seconds(side.detail(name))}" for name in sorted(names))


if __name__ == "__main__":
    main()
