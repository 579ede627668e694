"""A rank's part in the preflight, from its start to the verdict, and an end whatever hangs.

    all     start their probes, meet at the board, say where they sit
    rank 0  waits for the others, but not for ever; then `go`, with the seconds that are left
    all     pin up their facts; per node: the time, a visit to the shared folder, a call to rank 0
    all     all-reduce, if all are there
    rank 0  judges, prints, pins up the verdict: the exit code of all

Seconds count from the start of rank 0's process. What may hang runs in threads that nobody joins,
and a timer of the kernel's ends a process whose Python has stopped.
"""

from __future__ import annotations

import os
import time

import torch.distributed as dist

from megatron_prime.config import RunConfig
from megatron_prime.preflight.exchange import Board, meet
from megatron_prime.preflight.facts import Seat
from megatron_prime.preflight.guest import be_guest
from megatron_prime.preflight.host import be_host
from megatron_prime.preflight.probes import Probes, probes_of
from megatron_prime.preflight.steps import Options, Times
from megatron_prime.runtime.exit_timer import process_age
from megatron_prime.runtime.rendezvous import Rendezvous


def preflight(
    config: RunConfig, config_problem: str, here: Rendezvous, node: str, options: Options
) -> int:
    """This rank's part; the exit code. `node`: the name of this one, `config_problem`: why not."""
    seat = Seat(here.rank, here.local_rank, node, os.getpid())
    times = Times.of(time.monotonic() - process_age(), options.seconds)
    asked = probes_of(config, seat, here.local_world_size, options.asks_for_gpus, until=times.come)
    probes = Probes(seat, config_problem, asked)
    try:
        serves = here.rank == 0 and options.serves_store
        board = Board(meet(here, serves, times.come))
    except dist.DistError as error:
        if seat.leads:
            print(_not_met(here, seat, str(error).partition("\n")[0]), flush=True)
        return options.refused if here.rank == 0 else options.late  # rank 0 may come yet
    try:
        if here.rank == 0:
            return be_host(config, here, board, probes, times, options)
        return be_guest(config, here, seat, board, probes, times, options)
    except dist.DistError:  # the board is gone, and rank 0 with it
        if seat.leads:
            print(f"[preflight] {seat}: rank 0 ended before it gave a verdict", flush=True)
        return options.late


def _not_met(here: Rendezvous, seat: Seat, error: str) -> str:
    at = f"{here.master_addr}:{here.master_port}"
    if here.rank == 0:
        return (
            f"[preflight] refused: {seat} can't listen at {at} ({error}), where all ranks meet; "
            "see ss -tlnp for what does; MASTER_PORT: another port, MASTER_ADDR: another address"
        )
    return (
        f"[preflight] late: {seat} found no rank 0 at {at} ({error}); see what rank 0 says, "
        "whether its node is up, and whether that address is reached from here (MASTER_ADDR, "
        "MASTER_PORT, firewalls)"
    )
