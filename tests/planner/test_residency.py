"""The residency tables name every phase, and lose nothing that can't be made again."""

from __future__ import annotations

import pytest

from megatron_prime.planner.memory import WORK
from megatron_prime.planner.residency import ALL, KEPT, NEEDED, PHASES, RESIDENT, on_host
from megatron_prime.protocols import Phase


def test_the_phases_are_those_of_the_scheduler() -> None:
    assert set(PHASES) == {phase.value for phase in Phase}
    assert set(RESIDENT) == set(NEEDED) == set(PHASES)
    assert set(WORK) <= set(PHASES)


@pytest.mark.parametrize("phase", PHASES)
def test_what_can_not_be_made_again_is_somewhere(phase: str) -> None:
    assert NEEDED[phase] <= ALL
    for in_fp32 in (frozenset(), frozenset({"policy", "prm"})):
        host = on_host(phase, NEEDED, in_fp32)
        assert host | NEEDED[phase] >= KEPT
        assert not host & NEEDED[phase]  # one copy, never two
        assert not on_host(phase, RESIDENT, in_fp32)


def test_an_fp32_model_sleeps_in_host_memory() -> None:
    host = on_host("update_policy", NEEDED, frozenset({"policy", "prm"}))
    assert "prm.weights" in host
    assert "policy.weights" not in host  # it is awake
    assert "prm.weights" not in on_host("update_policy", NEEDED, frozenset())


@pytest.mark.parametrize("phase", WORK)
def test_who_works_has_its_weights(phase: str) -> None:
    for work in WORK[phase]:
        assert f"{work.split('.')[0]}.weights" in NEEDED[phase]
