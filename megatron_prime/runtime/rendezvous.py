"""Where the processes of a run meet, read from what torchrun or srun put into the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_prime.config import ConfigError

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """This process among all processes of the run, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this node: chooses the GPU
    master_addr: str = _LOOPBACK
    master_port: int = 29500  # torchrun's default
    attempt: int = 0  # torchrun's --max-restarts starts all ranks again, at the same store
    local_world_size: int = 1  # ranks on this node


def rendezvous_from(environ: Mapping[str, str]) -> Rendezvous:
    """Read torchrun's variables, else srun's, else a single process.

    Slurm's variables count only inside an srun step (where SLURM_STEP_NUM_TASKS is set): the body
    of an sbatch script has SLURM_NTASKS too, but is one process. The ranks meet on MASTER_ADDR,
    else on the step's first host. Raises ConfigError when a launcher's variables are incomplete.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environ]:
            raise ConfigError(
                f"found some of torchrun's variables, but not {', '.join(missing)}; start with "
                "torchrun or srun, or unset RANK and WORLD_SIZE for a single process"
            )
        return Rendezvous(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
            master_addr=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
            attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return Rendezvous(
            rank=int(environ["SLURM_PROCID"]),
            world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ.get("SLURM_LOCALID", "0")),
            local_world_size=_tasks_here(environ),
            master_addr=environ.get("MASTER_ADDR") or _first_host(environ),
            master_port=int(environ.get("MASTER_PORT") or _port_of_job(environ)),
        )
    return Rendezvous()


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of the step on the first node, which all others should have, too: `8(x4),4` → 8."""
    found = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(found.group()) if found else 1


def _port_of_job(environ: Mapping[str, str]) -> int:
    """A port that jobs sharing a node don't share."""
    return 20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 10_000


def _first_host(environ: Mapping[str, str]) -> str:
    """First name of a Slurm host list: `gpu[03-04,7],login1` → `gpu03`."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise ConfigError("srun gave no node list; set MASTER_ADDR to the host of rank 0")
    first = re.match(r"[^,\[]+(?:\[(\d+)[^\]]*\][^,\[]*)?", hosts)
    if first is None:
        raise ConfigError(f"found the node list {hosts!r}; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group(0))
