"""What rank 0 does in a preflight: it asks, judges, and says so."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from megatron_prime.config import RunConfig
from megatron_prime.preflight import clocks, steps
from megatron_prime.preflight.checks import problems_of
from megatron_prime.preflight.collectives import PAIRS, stages_of
from megatron_prime.preflight.exchange import Board
from megatron_prime.preflight.facts import FACTS, REDUCED, SEAT
from megatron_prime.preflight.findings import Findings, code_of
from megatron_prime.preflight.needs import Needs, needs_of
from megatron_prime.preflight.probes import Probes
from megatron_prime.preflight.shared_folder import Trial
from megatron_prime.preflight.table import report
from megatron_prime.runtime.hub import listen_on
from megatron_prime.runtime.rendezvous import Rendezvous

BYE_S = 3.0  # for the others to read the verdict
PAIRS_FROM = 0.25  # of all seconds: with less left pairs of nodes are left out, the whole is not


def be_host(
    config: RunConfig,
    here: Rendezvous,
    board: Board,
    probes: Probes,
    times: steps.Times,
    options: steps.Options,
) -> int:
    """The exit code, after the report was printed and everybody knows it."""
    start = times.end - options.seconds
    if probes.config_problem:
        board.pin("go", steps.GO.dump_json(steps.Go((), "", 0, code=2)).decode())
        _wait_for_byes(board, range(1, here.world_size), times)
        return 2
    found = Findings(here.world_size, waited_s=times.come - start)
    trial = Trial(config.run.folder, secrets.token_hex(8))
    opened = steps.within(trial.open, times.come)
    try:
        _ask(config, here, board, probes, times, found, trial)
        if opened != "":  # nobody could see what is not there
            found.shared = {0: opened}
        else:
            found.shared = {0: ""} | dict(found.shared)
    finally:
        steps.within(trial.close, times.reduce)
    _reduce(here, board, times, found, options.seconds)
    problems = problems_of(found)
    code = code_of(problems, options.refused, options.late)
    options.decided(code)
    print(report(found, problems, time.monotonic() - start, code), flush=True)
    board.pin("verdict", str(code))
    _wait_for_byes(board, [rank for rank in found.seats if rank], times)
    return code


def _ask(
    config: RunConfig,
    here: Rendezvous,
    board: Board,
    probes: Probes,
    times: steps.Times,
    found: Findings,
    trial: Trial,
) -> None:
    """Whoever comes, what they know, and what their nodes answer."""
    steps.pin_seat(board, probes.seat)
    found.seats = {
        seat.rank: seat
        for seat in map(SEAT.validate_json, _all(board, "seat", range(here.world_size), times.come))
    }
    listener = listen_on(here.master_addr, here.world_size > here.local_world_size)
    left_s = tuple(moment - time.monotonic() for moment in times)
    go = steps.Go(left_s, trial.name, listener.getsockname()[1])
    board.pin("go", steps.GO.dump_json(go).decode())
    steps.pin_facts(board, probes, times.probes)
    facts = map(FACTS.validate_json, _all(board, "facts", found.seats, times.facts))
    found.facts = {one.seat.rank: one for one in facts}
    leaders = [rank for rank in found.leading if rank]
    found.clocks = {rank: clocks.ask(board, rank, _half_of(times.clocks)) for rank in leaders}
    for kind in ("shared", "hub"):
        said = board.read_all([f"{kind}/{rank}" for rank in leaders], times.answers)
        setattr(found, kind, {rank: said.get(f"{kind}/{rank}") for rank in leaders})
    listener.close()
    visitors = [f"rank_{rank}" for rank in leaders if found.shared[rank] == ""]
    unseen = steps.within(lambda: trial.unseen(visitors), times.reduce) or []
    lost = f"a file that it wrote in {config.run.folder} is not seen by rank 0"
    found.shared = dict(found.shared) | {r: lost for r in leaders if f"rank_{r}" in unseen}
    found.needs = steps.within(lambda: _needs(config, found), times.reduce)


def _needs(config: RunConfig, found: Findings) -> Needs:
    gpus = [facts.gpu for facts in found.facts.values() if facts.gpu]
    smallest = min((gpu.total for gpu in gpus), default=None)
    local = max(map(len, found.nodes.values()))
    there = len(list((config.run.folder / "checkpoints").glob("step_*")))
    return needs_of(config, found.ranks, local, smallest, there)


def _reduce(
    here: Rendezvous, board: Board, times: steps.Times, found: Findings, seconds: float
) -> None:
    """All-reduces, when all ranks are there."""
    everyone = range(here.world_size)
    if set(found.facts) != set(everyone):
        board.pin("reduce", "[]")
        return
    on_gpu = all(facts.gpu for facts in found.facts.values())
    found.patience_s = max(0.0, times.reduce - time.monotonic())
    stages = stages_of(list(found.nodes.values()), on_gpu)
    if found.patience_s < PAIRS_FROM * seconds:
        found.skips_pairs = any(stage.name == PAIRS for stage in stages)
        stages = [stage for stage in stages if stage.name != PAIRS]
    found.stages = tuple(stages)
    board.pin("reduce", steps.STAGES.dump_json(found.stages).decode())
    steps.pin_reduced(board, 0, steps.reduce(here, board, found.stages, times.reduce))
    done = board.read_all([f"reduced/{rank}" for rank in everyone], times.reduce)
    found.reduced = {
        int(key.partition("/")[2]): REDUCED.validate_json(text) for key, text in done.items()
    }
    at = board.read_all([f"at/{rank}" for rank in everyone], time.monotonic())
    found.at = {int(key.partition("/")[2]): int(text) for key, text in at.items()}


def _all(board: Board, kind: str, ranks: Iterable[int], until: float) -> list[str]:
    return list(board.read_all([f"{kind}/{rank}" for rank in ranks], until).values())


def _wait_for_byes(board: Board, ranks: Iterable[int], times: steps.Times) -> None:
    until = min(times.end, time.monotonic() + BYE_S)
    board.read_all([f"bye/{rank}" for rank in ranks], until)


def _half_of(until: float) -> float:
    """The time for one of several, so that one without an answer leaves some to all others."""
    now = time.monotonic()
    return now + (until - now) / 2
