"""A rank without torch: joins, does what its deed says, and ends like `__main__`.

    watched_rank.py FOLDER RANK WORLD_SIZE LOST_AFTER_S DEED

Rank 0 leaves the hub's port and token in FOLDER; every rank leaves its process id there once all
have joined.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_prime.runtime import watchdog as module
from megatron_prime.runtime.hub import Hub
from megatron_prime.runtime.watchdog import Watchdog, beat_seconds, ended_because, say

JOIN_S = float(os.environ.get("JOIN_S", "60"))


def main(folder: Path, rank: int, world_size: int, lost_after_s: float, deed: str) -> int:
    hub = None
    module.ECHO_S, module.GRACE_S = 2.0, float(os.environ.get("GRACE_S", "1"))
    if rank == 0:
        hub = Hub("127.0.0.1", world_size, beat_seconds(lost_after_s), JOIN_S)
        (folder / "hub.part").write_text(f"{hub.port} {hub.token}")
        (folder / "hub.part").rename(folder / "hub")
    while not (folder / "hub").exists():
        time.sleep(0.01)
    port, token = (folder / "hub").read_text().split()
    watchdog = Watchdog(rank, ("127.0.0.1", int(port)), token, lost_after_s, 60, hub)
    watchdog.be_patient(lost_after_s)
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    match deed.split(":"):
        case ["wait"]:  # as in a collective that never ends
            time.sleep(600)
        case ["finish", seconds]:
            time.sleep(float(seconds))
        case ["fail", error, *echo]:
            ending = watchdog.failed(error, echo=bool(echo))
            assert ending is not None
            if ending.rank == rank:
                say(f"[rank {rank}] {ending.error}")
            elif ending.error != error:
                say(ended_because(rank, ending))
            watchdog.linger()
            return 1
        case ["hold", seconds]:  # the interpreter's lock, in native code
            ctypes.PyDLL(None).usleep(int(float(seconds) * 1e6))
        case ["fork"]:
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        case ["desert"]:  # after its bye
            threading.Timer(1, os._exit, (5,)).start()
        case _:
            raise ValueError(deed)
    watchdog.finish()
    return 0


if __name__ == "__main__":
    folder, rank, world_size, lost_after_s, deed = sys.argv[1:]
    os._exit(main(Path(folder), int(rank), int(world_size), float(lost_after_s), deed))
