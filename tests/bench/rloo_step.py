"""A whole training step: outcome-only RLOO and PRIME here, RLOO in TRL.

    python tests/bench/rloo_step.py FOLDER [--turns N] [--only NAME …] [--section.key=value …]

64 prompts × 4 responses × 64 tokens, one optimizer step; FOLDER is model.py's. Overrides go to
megatron_prime's configuration.
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
SCRIPTS = {"rloo": ("rloo_ours.py", ["rloo"]), "prime": ("rloo_ours.py", ["prime"])}


def main(arguments: list[str] | None = None) -> None:
    """Print the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="of each contestant")
    known, overrides = parser.parse_known_args(arguments)
    with ExitStack() as stack:
        rloo, prime, trl = (
            stack.enter_context(contestant(name, known.folder, known.ranks, overrides))
            for name in ("rloo", "prime", "trl")
        )
        take_turns([rloo, prime, trl], known.warm_up, known.turns)
    how = f"{known.ranks} rank{'s' * (known.ranks > 1)} × {CORES // known.ranks} threads"
    for what, ours, theirs, aim in (
        ("RLOO step against TRL's", rloo, trl, "≥ 1.3 ×"),
        ("PRIME step against TRL's RLOO", prime, trl, "≥ 1 ×"),
        ("PRIME step against RLOO here", prime, rloo, ""),
    ):
        faster(f"{what}, {how}", ours.median, theirs.median, aim, steps(ours, theirs))


def contestant(name: str, folder: Path, ranks: int, overrides: list[str]) -> Contestant:
    """Start one: `rloo` and `prime` are ours, `trl` is TRL's RLOO."""
    script, kind = SCRIPTS.get(name, ("rloo_trl.py", []))
    extra = [] if name == "trl" else overrides
    return Contestant(name, HERE / script, [folder, *kind, *extra], ranks, CORES // ranks)


def steps(ours: Contestant, theirs: Contestant) -> str:
    """Where the time of our step goes, and tokens per second of both."""
    phases = sorted(key for key in ours.details[0] if key.startswith("time/") and "step" not in key)
    parts = ", ".join(f"{phase[5:-2]} {seconds(ours.detail(phase))}" for phase in phases)
    rates = " against ".join(f"{TOKENS / side.median:.0f}" for side in (ours, theirs))
    return f"{parts}; {rates} response tokens/s"


if __name__ == "__main__":
    main()
