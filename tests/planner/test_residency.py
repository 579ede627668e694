"""The residency tables name every phase, and lose nothing that can't be made again."""

from __future__ import annotations

import pytest

from megatron_prime.planner.memory import WORK
from megatron_prime.planner.residency import (
    ALL,
    CHEAPEST_FIRST,
    KEPT,
    MADE_FROM,
    MOVES,
    NEEDED,
    PHASES,
    RESIDENT,
    START,
    SYNC,
    WRITTEN,
    choose,
    on_host,
)
from megatron_prime.protocols import Phase


def test_the_phases_are_those_of_the_scheduler() -> None:
    assert set(PHASES) == {phase.value for phase in Phase}
    assert set(RESIDENT) == set(NEEDED) == set(PHASES)
    assert set(WORK) <= set(PHASES)


@pytest.mark.parametrize("phase", PHASES)
def test_what_can_not_be_made_again_is_somewhere(phase: str) -> None:
    assert NEEDED[phase] <= ALL
    for in_fp32 in (frozenset(), frozenset({"policy", "prm"})):
        assert on_host(NEEDED, in_fp32) | NEEDED[phase] >= KEPT
        assert not on_host(RESIDENT, in_fp32)


def test_all_that_nothing_makes_again_has_a_copy_on_the_host_unless_everything_stays() -> None:
    once = {**RESIDENT, "update_prm": ALL - {"policy.moments", "policy.gradients"}}
    for table in (NEEDED, once, dict(RESIDENT)):
        assert on_host(table, frozenset()) == KEPT
    assert on_host(RESIDENT, frozenset({"policy"})) == frozenset()


def test_an_fp32_model_sleeps_in_host_memory() -> None:
    weights = {"policy.weights", "prm.weights"}
    assert on_host(NEEDED, frozenset({"policy", "prm"})) == KEPT | weights
    assert on_host(NEEDED, frozenset({"prm"})) & weights == {"prm.weights"}


@pytest.mark.parametrize("phase", WORK)
def test_who_works_has_its_weights(phase: str) -> None:
    for work in WORK[phase]:
        assert f"{work.split('.')[0]}.weights" in NEEDED[phase]


def test_what_leaves_can_leave_and_what_is_written_is_there() -> None:
    assert set(CHEAPEST_FIRST) == ALL - SYNC
    assert len(CHEAPEST_FIRST) == len(set(CHEAPEST_FIRST))
    for phase, names in WRITTEN.items():
        assert names <= NEEDED[phase]
    assert set(MADE_FROM) <= ALL
    assert set(MADE_FROM.values()) <= KEPT


def test_the_engine_keeps_its_weights_from_a_sync_until_it_samples() -> None:
    """Nobody could give them back: only SYNC_WEIGHTS fills them."""
    reachable = [p for p in PHASES if p in MOVES["sync_weights"]]
    while new := [q for p in reachable for q in MOVES[p] if q not in reachable and p != "generate"]:
        reachable += new
    assert set(reachable) == {"generate", "evaluate", "checkpoint"}
    assert all("engine.weights" in NEEDED[phase] for phase in reachable)
    assert set(MOVES[START]) <= set(PHASES)


BYTES = {
    "policy.weights": 2, "policy.gradients": 4, "policy.masters": 4, "policy.moments": 8,
    "prm.weights": 2, "prm.gradients": 4, "prm.masters": 4, "prm.moments": 8,
    "reference.weights": 2, "engine.weights": 2, "engine.kv_cache": 10, "sync.buffers": 1,
}  # fmt: skip
BESIDE = {"update_policy": 5, "update_prm": 5, "score": 2}


def used(table, phase):
    return sum(n for name, n in BYTES.items() if name in table[phase]) + BESIDE.get(phase, 0)


@pytest.mark.parametrize("budget", range(20, 60))
def test_as_little_leaves_as_fits(budget) -> None:
    table = choose(BYTES, BESIDE, budget)
    assert all(table[phase] >= NEEDED[phase] for phase in PHASES)
    away = {name for name in BYTES if any(name not in table[phase] for phase in PHASES)}
    if budget >= sum(BYTES.values()) + 5:  # 56
        assert not away
        return
    fits = all(used(table, phase) <= budget for phase in PHASES)
    assert fits == (budget >= used(NEEDED, "update_policy"))  # 24: the most that any phase needs
    for name in away if fits else ():
        kept = {phase: row | {name} for phase, row in table.items()}
        assert not all(used(kept, phase) <= budget for phase in PHASES), f"{name} could have stayed"


def test_what_costs_nothing_leaves_before_what_is_copied() -> None:
    table = choose(BYTES, BESIDE, 48)  # eight too few
    away = {name for name in BYTES if any(name not in table[phase] for phase in PHASES)}
    assert away <= {"policy.gradients", "prm.gradients", "engine.kv_cache"}
