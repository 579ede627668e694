"""A rank of `megatron_prime preflight` that something is wrong with.

    spoilt_rank.py DEED preflight RUN.toml …

DEED: what is spoilt, in this process alone; several with a + between them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_prime.__main__ import main

AHEAD_S = 120.0


def spoil(deed: str) -> None:
    from megatron_prime.preflight import clocks, collectives, probes, steps
    from megatron_prime.preflight.facts import Disk

    replaced: Any = {
        "none": lambda: None,
        "version": lambda: setattr(probes, "installed", lambda name: f"{name}-of-this-node"),
        "disk": lambda: setattr(probes, "disk", lambda folder: Disk(1000, 2000)),
        "clock": lambda: setattr(
            clocks, "time", SimpleNamespace(time=lambda: time.time() + AHEAD_S)
        ),
        "sleep": lambda: setattr(collectives, "reduce_one", lambda *_: time.sleep(600)),
        "dies": lambda: setattr(steps, "pin_facts", lambda *_: os._exit(9)),
        "probe": lambda: setattr(probes, "sources", lambda config: time.sleep(600)),
        "blind": lambda: setattr(Path, "read_text", _nothing_there(Path.read_text)),
    }
    for one in deed.split("+"):
        replaced[one]()


def _nothing_there(read: Any) -> Any:
    """Of the shared folder only what this node wrote is seen, as of a node's own /tmp."""

    def read_text(path: Path, *arguments: Any, **keywords: Any) -> str:
        if path.parent.name.startswith(".preflight_"):
            raise FileNotFoundError(path)
        return str(read(path, *arguments, **keywords))

    return read_text


if __name__ == "__main__":
    spoil(sys.argv[1])
    code = main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)
