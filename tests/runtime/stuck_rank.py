"""A rank whose phase may never end: joins, meets the others in a collective, does its deed.

    stuck_rank.py FOLDER DEADLINE_S DEED [DEED …]

The deeds of ranks 0, 1 …; who they are, torchrun's environment variables say.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prime.config import DeadlineSection
from megatron_prime.protocols import Phase
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.rendezvous import rendezvous_from


def wait_for_the_others() -> None:
    dist.all_reduce(torch.ones(1))


def sleeps_for_ever() -> None:
    time.sleep(600)


def holds_the_lock() -> None:
    ctypes.PyDLL(None).usleep(600_000_000)


DEEDS = {"meet": wait_for_the_others, "sleep": sleeps_for_ever, "hold": holds_the_lock}


def main(folder: Path, deadline_s: float, deed: str, rank: int, launch: Launch) -> int:
    timeout = timedelta(seconds=600)
    size = launch.here.world_size
    knobs = DeadlineSection.model_validate({f"{phase.value}_s": deadline_s for phase in Phase})
    store = launch.store or dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    with (
        launch.steps(agree=None),
        launch.deadlines(folder, knobs) as deadlines,
    ):
        with deadlines.phase(Phase.SCORE):
            wait_for_the_others()
        (folder / f"{rank}.started").write_text(str(time.time()))
        if deed == "kill":
            os.kill(os.getpid(), 9)
        with deadlines.phase(Phase.UPDATE_PRM):
            DEEDS[deed]()
    launch.finish()
    return 0


if __name__ == "__main__":
    folder, deadline_s, *deeds = sys.argv[1:]
    here = rendezvous_from(os.environ)
    lost_after_s = float(os.environ.get("LOST_AFTER_S", "300"))
    launch = Launch(here, lost_after_s, timeout_s=60, saves=True)
    try:
        code = main(Path(folder), float(deadline_s), deeds[here.rank], here.rank, launch)
    except BaseException as error:
        code = launch.failed(error)
    os._exit(code)
