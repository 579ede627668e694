"""A PRIME step against a step of outcome-only RLOO, as generation's share of the step grows.

    python tests/bench/prime_step.py FOLDER [--rounds 64 512] [--turns N] [--section.key=value …]

Both generate, verify, update the policy and hand it to the engine; PRIME scores with the reference
and updates the PRM beside that. A step trains on 64 prompts × 4 responses × 64 tokens, in one
optimizer step; it generates `--rounds` prompts and puts the others back, which sets the share of
generation. FOLDER is model.py's. With g, the share of RLOO's step that is not its update or
scoring, PRIME should take

    1 + (1 - g) (reference + PRM) / policy

times as long. In forwards of one model, reference + PRM are 1 + 3 and the policy is 3, so that at
most 1.15 times needs g of at least 0.89.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rloo_step import contestant, phases
from table import row, seconds
from turns import Contestant, take_turns

TRAINS = ("score", "update_prm", "update_policy")


def main(arguments: list[str] | None = None) -> None:
    """Print a row of the table for each size of a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--rounds", type=int, nargs="+", default=[64, 512], help="prompts in one")
    parser.add_argument("--ranks", type=int, default=2, help="the layout; two cores in any case")
    known, overrides = parser.parse_known_args(arguments)
    for prompts in known.rounds:
        knobs = [f"--rollout.prompts_per_round={prompts}", *overrides]
        with ExitStack() as stack:
            prime, rloo = (
                stack.enter_context(contestant(name, known.folder, known.ranks, knobs))
                for name in ("prime", "rloo")
            )
            take_turns([prime, rloo], known.warm_up, known.turns)
            compare(prime, rloo, prompts)


def compare(prime: Contestant, rloo: Contestant, prompts: int) -> None:
    """One row: the ratio found, the one to be expected, and where both steps' time goes.

    The ratio is the median of those of two turns next to each other, which other work on the
    machine slows down alike.
    """
    ratio = median(ours / theirs for ours, theirs in zip(prime.seconds, rloo.seconds, strict=True))
    training = trained(rloo)
    share = 1 - sum(training.values()) / rloo.median
    extra = sum(trained(prime).values()) - sum(training.values())
    row(
        f"PRIME step against RLOO here, {prompts} prompts generated",
        seconds(prime.median),
        seconds(rloo.median),
        f"{ratio:.2f} × as long",
        "≤ 1.15",
        f"generation and the like are {share:.0%} of RLOO's step: {1 + extra / rloo.median:.2f} × "
        f"expected; PRIME: {phases(prime)}; RLOO: {phases(rloo)}; medians of {len(rloo.seconds)} "
        f"turns, {prime.name}",
    )


def trained(side: Contestant) -> dict[str, float]:
    """Median seconds of the phases in which models score and train."""
    names = (f"time/{phase}_s" for phase in TRAINS)
    return {name: side.detail(name) for name in names if name in side.details[0]}


if __name__ == "__main__":
    main()
