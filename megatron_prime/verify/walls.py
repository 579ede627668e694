"""What a sandbox is built of on this machine: settings for the zygote, rules, filter."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prime.errors import RunError
from megatron_prime.verify import landlock, seccomp


class SandboxUnavailable(RunError):
    """No program can be run safely here; says what is missing."""

    def __init__(self, why: object) -> None:
        super().__init__(f"sandbox unavailable: {why}")


@dataclass(frozen=True, slots=True)
class Isolation:
    """How programs are kept in."""

    kind: Literal["kernel", "none"] = "kernel"  # "none": limits only, for who isolates otherwise
    memory_mib: int = 1024  # that a program may take
    numpy: bool = False  # whether programs may import it
    landlock: bool = True  # False: as if the kernel had none


def build(isolation: Isolation) -> tuple[dict[str, Any], int | None]:
    """The zygote's settings, and the descriptor of Landlock's rules if there are any."""
    machine, rules, code = platform.machine(), None, None
    numpy = _home_of_numpy() if isolation.numpy else None
    if isolation.kind == "kernel":
        if sys.platform != "linux" or machine not in seccomp.MACHINES:
            known = " or ".join(seccomp.MACHINES)
            raise SandboxUnavailable(f"found {sys.platform} on {machine}, wanted Linux on {known}")
        if isolation.landlock and landlock.abi():
            rules = _rules(numpy)
        code = seccomp.program(machine, may_open=rules is not None).hex()
    settings = {
        "filter": code,
        "memory": isolation.memory_mib << 20,
        "numpy": None if numpy is None else str(numpy),
        "rules": rules,
    }
    return settings, rules


def _rules(numpy: Path | None) -> int:
    library = Path(os.__file__).parent
    readable = [p for p in library.iterdir() if p.name not in ("site-packages", "dist-packages")]
    readable += [Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom")]
    if numpy is not None:
        readable += [numpy / "numpy", numpy / "numpy.libs"]
    try:
        return landlock.ruleset(readable, [library])
    except OSError as error:
        raise SandboxUnavailable(error) from error


def _home_of_numpy() -> Path:
    found = importlib.util.find_spec("numpy")
    if found is None or found.origin is None:
        raise SandboxUnavailable("programs are to have numpy (verify.numpy), found none installed")
    return Path(found.origin).parents[1]
