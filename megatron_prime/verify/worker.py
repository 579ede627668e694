"""A checker process: one JSON line per check comes in, one per result goes out.

Checks run model-written input through SymPy, which may hang, eat memory or crash. So they run here,
where nothing but one check is lost: the address space is limited, the process dies with its parent,
and what libraries print goes to stderr. Programs go on into a sandbox of this worker. The first
line out says that the imports, seconds of them, are done. Started by `pool.py`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from megatron_prime.runtime.parent import die_with
from megatron_prime.verify import code_tests
from megatron_prime.verify.code_tests import CodeLimits
from megatron_prime.verify.math_answer import grade

CHECKERS: dict[str, Callable[[str, str], float]] = {"math": grade, "code": code_tests.grade}
SUPPORTED_ABILITIES = tuple(CHECKERS)
READY = b'{"ready": true}\n'
ADDRESS_SPACE = 4 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Check:
    """A line to the worker."""

    id: int
    ability: str
    response: str
    ground_truth: str

    def to_line(self) -> bytes:
        """As a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Check:
        """Read a line of JSON; ValueError or TypeError if it isn't a check's."""
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class Result:
    """A line from the worker."""

    id: int
    reward: float | None  # in [0, 1]; None if the checker raised

    def to_line(self) -> bytes:
        """As a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Result:
        """Read a line of JSON; ValueError or TypeError if it isn't a result's."""
        return cls(**json.loads(line))


def run_check(check: Check) -> Result:
    """Score one response; no reward if the checker raises, and a line about it on stderr."""
    try:
        return Result(check.id, CHECKERS[check.ability](check.response, check.ground_truth))
    except Exception as error:  # a library's failure on hostile input concerns this check alone
        print(f"verifier worker: {check.ability} check: {error!r}"[:500], file=sys.stderr)
        return Result(check.id, None)


def main(parent: int, limits: CodeLimits) -> None:
    """Serve checks from stdin until it ends."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_memory()
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library's print must not look like a result
    CHECKERS["math"](r"\boxed{\frac{1}{2}}", "0.5")  # imports what it needs
    CHECKERS["code"] = code_tests.CodeGrader(limits).grade
    results.write(READY)
    for line in sys.stdin.buffer:
        results.write(run_check(Check.from_line(line)).to_line())


def _limit_memory() -> None:
    """Let a check that asks for more than ADDRESS_SPACE fail with a MemoryError."""
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    limit = ADDRESS_SPACE if allowed == resource.RLIM_INFINITY else min(ADDRESS_SPACE, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (limit, allowed))


if __name__ == "__main__":
    main(int(sys.argv[1]), CodeLimits.from_json(sys.argv[2]))
