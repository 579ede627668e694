"""New weights into the engines: our sync against the usual way, on four ranks of TP 2 × PP 2.

    python tests/bench/bench_reshard.py [--repeat N] [--hidden H --layers L --vocabulary V]

The usual way gathers every full tensor on every rank, flattens them into buckets, and hands those
to the engine process of each rank, which cuts its share out of them (SGLang's `flattened_bucket`).
Ours sends what an engine rank holds, with checksums. Both hand over in shared memory that is opened
once, in two buffers that take turns; the engine is a stand-in with SGLang's parameters and no HTTP
on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from table import faster, row
from turns import free_port

RANKS = 4
WAYS = ("ours", "usual")
ENGINE_TPS = (1, 2, 4)
AIM_S = {2: "≥ 2 ×"}
AIM_BYTES = {4: "≥ 4 ×"}


def main() -> None:
    """Print three rows of the table for each engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--bucket-mib", type=int, default=32)
    known = vars(parser.parse_args())
    options = [f"--{name.replace('_', '-')}={value}" for name, value in known.items()]
    for tp in ENGINE_TPS:
        found = compare(tp, options)
        what = f"weight sync, {found['parameters'] / 1e6:.0f} M parameters, rollout TP {tp}"
        faster(
            what,
            found["ours_s"],
            found["usual_s"],
            AIM_S.get(tp, ""),
            f"TP 2 × PP 2, fp32, {found['rounds']:.0f} rounds; without checksums"
            f" {found['without_checksums_s']:.3g} s",
        )
        print_bytes(found["mean"], found["busiest"], AIM_BYTES.get(tp, ""))
        ours, usual = (found["busiest"][f"{way}_peak"] for way in WAYS)
        row(
            "- peak extra memory per rank",
            megabytes(ours),
            megabytes(usual),
            f"{usual / ours:.2f} ×",
            "",
            f"trainer and engine together, both buffers of {known['bucket_mib']} MiB included;"
            " busiest rank",
        )


def print_bytes(mean: dict[str, float], busiest: dict[str, float], aim: str) -> None:
    """A row: what a rank gets from other ranks and what its engine process is handed."""

    def both(of: dict[str, float], way: str) -> float:
        return of[f"{way}_network"] + of[f"{way}_handed"]

    parts = ", against ".join(
        f"{megabytes(mean[f'{way}_network'])} from other ranks and"
        f" {megabytes(mean[f'{way}_handed'])} handed to the engine"
        for way in WAYS
    )
    row(
        "- bytes received per engine rank",
        megabytes(both(mean, "ours")),
        megabytes(both(mean, "usual")),
        f"{both(mean, 'usual') / both(mean, 'ours'):.2f} ×",
        aim,
        f"{parts} ({mean['usual_handed'] / mean['ours_handed']:.2f} ×); mean of the ranks, busiest"
        f" {both(busiest, 'usual') / both(busiest, 'ours'):.2f} ×",
    )


def compare(tp: int, options: list[str]) -> dict[str, Any]:
    """What the ranks report for engines of `tp`."""
    ranks = Path(__file__).with_name("reshard_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", str(ranks), str(tp)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, *options], env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def megabytes(nbytes: float) -> str:
    """Whole ones."""
    return f"{nbytes / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
