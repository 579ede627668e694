"""What every rank but 0 does in a preflight: it answers, and waits for the verdict."""

from __future__ import annotations

import socket

from megatron_prime.config import RunConfig
from megatron_prime.preflight import clocks, steps
from megatron_prime.preflight.exchange import Board
from megatron_prime.preflight.facts import Seat
from megatron_prime.preflight.probes import Probes
from megatron_prime.preflight.shared_folder import Trial
from megatron_prime.runtime.rendezvous import Rendezvous

CALL_S = 5.0  # for a connection to rank 0's node
PINNED_S = 0.2  # for an answer to be on the board before rank 0 stops looking


def be_guest(
    config: RunConfig,
    here: Rendezvous,
    seat: Seat,
    board: Board,
    probes: Probes,
    times: steps.Times,
    options: steps.Options,
) -> int:
    """The exit code, which rank 0 decides on; `options.late` if it does not."""
    steps.pin_seat(board, seat)
    if (said := board.read("go", times.end)) is None:
        return options.late
    go = steps.GO.validate_json(said)
    if go.code is None:
        times = go.times()
        steps.pin_facts(board, probes, times.probes)
        if seat.leads:
            _answer_for_node(config, here, board, go, times)
        if stages := board.read("reduce", times.reduce):
            todo = steps.STAGES.validate_json(stages)
            done = steps.reduce(here, board, todo, times.reduce) if todo else None
            steps.pin_reduced(board, seat.rank, done)
    verdict = str(go.code) if go.code is not None else board.read("verdict", times.end)
    code = options.late if verdict is None else int(verdict)
    options.decided(code)
    board.pin(f"bye/{seat.rank}", "")
    return code


def _answer_for_node(
    config: RunConfig, here: Rendezvous, board: Board, go: steps.Go, times: steps.Times
) -> None:
    rank = here.rank
    trial = Trial(config.run.folder, go.trial)
    visited = steps.Begun(lambda: trial.visit(f"rank_{rank}"))
    called = steps.Begun(lambda: call(here.master_addr, go.port))
    clocks.answer(board, rank, times.clocks)  # rank 0 may be held up by others that are silent
    for kind, begun in {"shared": visited, "hub": called}.items():
        if (problem := begun.found(times.answers - PINNED_S)) is not None:
            board.pin(f"{kind}/{rank}", problem)


def call(address: str, port: int) -> str:
    """Connect to rank 0's node as a rank of `train` does; what went wrong, or nothing."""
    try:
        socket.create_connection((address, port), timeout=CALL_S).close()
    except OSError as error:
        return f"no way to port {port} of {address}, rank 0's node: {error}"
    return ""
