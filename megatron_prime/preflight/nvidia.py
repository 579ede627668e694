"""What nvidia-smi says about a node's GPUs: driver, computing mode, ECC errors, other processes.

torch sees none of that. Where there is no nvidia-smi (a CPU, a slim container) nothing is found,
and nothing is wrong with that. Inside a container processes of others may stay unseen; the free
memory, which torch tells, does not lie.
"""

from __future__ import annotations

import shutil

from megatron_prime.preflight.children import output_of
from megatron_prime.preflight.facts import Card, Driver, Tenant

MIB = 2**20
_CARDS = "driver_version,uuid,compute_mode,ecc.errors.uncorrected.volatile.total"
_TENANTS = "gpu_uuid,pid,used_memory,process_name"


def driver() -> Driver:
    """Ask; raises OSError or RuntimeError if it can't answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver()

    def ask(query: str) -> str:
        command = [program, query, "--format=csv,noheader,nounits"]
        return output_of(command)

    return parsed(ask(f"--query-gpu={_CARDS}"), ask(f"--query-compute-apps={_TENANTS}"))


def parsed(cards: str, tenants: str) -> Driver:
    """From the two tables that nvidia-smi prints; what it does not know stands there as `[N/A]`."""
    rows = [_cells(line) for line in cards.splitlines() if line]
    others = [_cells(line, 3) for line in tenants.splitlines() if line]
    return Driver(
        version=rows[0][0] if rows else "",
        cards=tuple(Card(row[1], row[2], _number(row[3])) for row in rows),
        tenants=tuple(
            Tenant(uuid, int(pid), name, (_number(used) or 0) * MIB)
            for uuid, pid, used, name in others
        ),
    )


def _cells(line: str, commas: int = -1) -> list[str]:
    return [cell.strip() for cell in line.split(",", commas)]


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None
