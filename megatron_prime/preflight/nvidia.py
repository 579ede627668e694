"""What nvidia-smi says about a node's GPUs: driver, computing mode, ECC errors, other processes.

torch sees none of that. Where there is no nvidia-smi (a CPU, a slim container) nothing is found,
and nothing is wrong with that. Inside a container processes of others may stay unseen; the free
memory, which torch tells, does not lie.
"""

from __future__ import annotations

import shutil
import subprocess

from megatron_prime.preflight.facts import Card, Driver, Tenant

MIB = 2**20
PATIENCE_S = 20.0  # without the persistence daemon the driver takes seconds to start
_CARDS = "driver_version,uuid,compute_mode,ecc.errors.uncorrected.volatile.total"
_TENANTS = "gpu_uuid,pid,used_memory,process_name"


def driver() -> Driver:
    """Ask; raises OSError or subprocess.SubprocessError if it can't answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver()

    def ask(query: str) -> str:
        command = [program, query, "--format=csv,noheader,nounits"]
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=PATIENCE_S
        )
        return found.stdout

    return parsed(ask(f"--query-gpu={_CARDS}"), ask(f"--query-compute-apps={_TENANTS}"))


def parsed(cards: str, tenants: str) -> Driver:
    """From the two tables that nvidia-smi prints; what it does not know stands there as `[N/A]`."""
    rows = [[cell.strip() for cell in line.split(",")] for line in cards.splitlines() if line]
    others = [
        [cell.strip() for cell in line.split(",", 3)] for line in tenants.splitlines() if line
    ]
    return Driver(
        version=rows[0][0] if rows else "",
        cards=tuple(Card(row[1], row[2], _number(row[3])) for row in rows),
        tenants=tuple(
            Tenant(uuid, int(pid), name, (_number(used) or 0) * MIB)
            for uuid, pid, used, name in others
        ),
    )


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None
