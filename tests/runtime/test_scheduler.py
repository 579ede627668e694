from __future__ import annotations

import pytest

from megatron_prime.protocols import Phase
from megatron_prime.runtime import scheduler as module
from megatron_prime.runtime.scheduler import ResidentScheduler


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def spend(scheduler, clock, phase, seconds):
    with scheduler.phase(phase):
        clock.now += seconds


def test_adds_up_the_seconds_of_each_phase(clock):
    scheduler = ResidentScheduler(lambda phase: None)
    spend(scheduler, clock, Phase.GENERATE, 2.0)
    clock.now += 50.0  # between phases: nobody's
    spend(scheduler, clock, Phase.UPDATE_PRM, 1.5)
    spend(scheduler, clock, Phase.GENERATE, 0.25)
    assert scheduler.take_seconds() == {"time/generate_s": 2.25, "time/update_prm_s": 1.5}


def test_take_starts_again_at_zero(clock):
    scheduler = ResidentScheduler(lambda phase: None)
    assert scheduler.take_seconds() == {}
    spend(scheduler, clock, Phase.SCORE, 2.0)
    scheduler.take_seconds()
    spend(scheduler, clock, Phase.SCORE, 3.0)
    assert scheduler.take_seconds() == {"time/score_s": 3.0}
    assert scheduler.take_seconds() == {}


def test_tells_which_phase_begins(clock):
    told = []
    scheduler = ResidentScheduler(lambda phase: told.append((phase, clock.now)))
    spend(scheduler, clock, Phase.GENERATE, 2.0)
    spend(scheduler, clock, Phase.CHECKPOINT, 1.0)
    assert told == [(Phase.GENERATE, 100.0), (Phase.CHECKPOINT, 102.0)]


@pytest.mark.parametrize("inner", [Phase.SCORE, Phase.GENERATE])
def test_a_phase_inside_a_phase_is_an_error(inner):
    scheduler = ResidentScheduler(lambda phase: None)
    with (
        scheduler.phase(Phase.GENERATE),
        pytest.raises(RuntimeError, match=f"phase {inner.value} began inside phase generate"),
        scheduler.phase(inner),
    ):
        raise AssertionError("the inner phase must not begin")


def test_an_error_ends_the_phase_and_its_time_counts(clock):
    scheduler = ResidentScheduler(lambda phase: None)

    @scheduler.phase(Phase.SCORE)
    def fail():
        clock.now += 4.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    spend(scheduler, clock, Phase.GENERATE, 1.0)
    assert scheduler.take_seconds() == {"time/score_s": 4.0, "time/generate_s": 1.0}


def test_waits_for_the_gpu_before_it_stops_the_clock(clock, monkeypatch):
    def finish_queued_work():
        clock.now += 7.0

    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "synchronize", finish_queued_work)
    scheduler = ResidentScheduler(lambda phase: None)
    spend(scheduler, clock, Phase.UPDATE_POLICY, 1.0)
    assert scheduler.take_seconds() == {"time/update_policy_s": 8.0}


def test_peak_memory_is_this_process() -> None:
    import psutil

    peak = ResidentScheduler(lambda _: None).peak_memory()["memory/host_peak_gib"] * 2**30
    now = psutil.Process().memory_info().rss
    assert 0.95 * now <= peak < 100 * 2**30
