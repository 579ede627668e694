"""Accounts kept by a clock that the test sets, so that every figure is exact."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megatron_prime.protocols import Phase
from megatron_prime.runtime.timeline import Round, Seconds, Timeline
from megatron_prime.runtime.trace import Trace

NOTHING = {}


class Clock:
    """Seconds that pass when told to."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def one_round(timeline: Timeline, clock: Clock, tail_s: float = 4.0) -> Seconds | None:
    """8 slots for 10 s, then 2 of them for `tail_s`; 3 s of checks, 5 s for the others."""
    timeline.generating(slots=8)
    clock.now += 6
    timeline.checking()
    clock.now += 4
    timeline.at_work(2)
    clock.now += tail_s / 2
    timeline.checked()  # of an early group
    clock.now += tail_s / 2
    timeline.generated()
    clock.now += 3
    timeline.checked()
    timeline.generated()  # said again
    clock.now += 5
    return timeline.met()


def test_a_round_is_cut_up_without_gap_or_overlap(clock: Clock) -> None:
    began = clock.now
    seconds = one_round(Timeline(clock=clock), clock)
    assert seconds == Seconds(busy=10 + 4 * 2 / 8, long_tail=4 * 6 / 8, verifying=3, straggling=5)
    assert sum(seconds) == clock.now - began


def test_checks_that_were_done_before_the_last_rollout_cost_nothing(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    timeline.generating(4)
    clock.now += 1
    timeline.checked()
    clock.now += 2
    timeline.generated()
    clock.now += 6
    assert timeline.met() == Seconds(busy=3, long_tail=0, verifying=0, straggling=6)


def test_batches_that_follow_each_other_have_a_tail_each() -> None:
    round_ = Round()
    round_.generating(0, slots=4)
    round_.at_work(2, 1)  # of the first batch
    round_.at_work(6, 4)  # the second begins
    round_.at_work(9, 2)
    round_.at_work(10, 1)
    round_.generated(12)
    busy = 2 + 4 / 4 + 3 + 1 / 2 + 2 / 4
    assert round_.met(12) == Seconds(busy, 12 - busy, 0, 0)


def test_a_wait_between_two_passes_is_for_the_others() -> None:
    round_ = Round()
    round_.generating(0, 2)
    round_.generated(5)
    round_.checks_done = 6.0
    round_.generating(10, 2)  # a server had to be restarted
    round_.at_work(12, 1)
    round_.generated(16)
    assert round_.met(17) == Seconds(busy=5 + 2 + 2, long_tail=2, verifying=1, straggling=4 + 1)


def test_a_rank_without_a_prompt_waits_for_the_others() -> None:
    round_ = Round()
    round_.generating(0, slots=0)
    round_.generated(0)
    assert round_.met(7) == Seconds(0, 0, 0, 7)


def test_a_rank_that_has_no_engine_of_its_own_says_nothing(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    timeline.at_work(1)
    timeline.generated()
    timeline.checking()
    timeline.checked()
    assert timeline.met() is None


def test_metrics_are_means_over_those_who_sampled_and_sums_over_rounds(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    with timeline.phase(Phase.GENERATE):
        for _ in range(2):
            mine = one_round(timeline, clock)
            timeline.count([mine, Seconds(13, 5, 1, 3), None])
    clock.now += 9
    assert timeline.take_seconds() == {
        "time/busy_generating_s": 11 + 13,
        "time/idle_long_tail_s": 3 + 5,
        "time/idle_verifying_s": 3 + 1,
        "time/idle_straggling_s": 5 + 3,
    }
    assert timeline.take_seconds() == NOTHING


@pytest.mark.parametrize("phase", [Phase.EVALUATE, None])
def test_only_generation_for_training_is_counted(clock: Clock, phase: Phase | None) -> None:
    timeline = Timeline(clock=clock)
    if phase is None:
        timeline.count([one_round(timeline, clock)])
    else:
        with timeline.phase(phase):
            timeline.count([one_round(timeline, clock)])
    assert timeline.take_seconds() == NOTHING


def test_a_round_that_broke_off_is_not_continued(clock: Clock) -> None:
    timeline = Timeline(clock=clock)

    def break_off() -> None:
        with timeline.phase(Phase.GENERATE):
            timeline.generating(4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    clock.now += 100
    with timeline.phase(Phase.GENERATE):
        assert sum(one_round(timeline, clock) or ()) == 10 + 4 + 3 + 5


def test_what_is_drawn(tmp_path: Path, clock: Clock) -> None:
    timeline = Timeline(Trace(tmp_path, 2, fresh=True), clock)
    with timeline.switching({"prm.weights"}, {"engine.weights", "a"}) as notes:
        clock.now += 0.5
        notes["bytes_to_host"] = 4096
    with timeline.phase(Phase.GENERATE):
        one_round(timeline, clock)
        one_round(timeline, clock)
    timeline.step(7)
    events = written(timeline)
    spans = [(e["cat"], e["name"], at(e), e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    spans = [(lane, name, start - spans[0][2], length) for lane, name, start, length in spans]
    assert spans == [
        ("moves", "move", 0, 0.5),
        ("idle", "switching", 0, 0.5),
        ("rollouts", "round 1", 0.5, 14),
        ("checks", "checks", 6.5, 11),
        ("idle", "verifying", 14.5, 3),
        ("idle", "straggling", 17.5, 5),
        ("rollouts", "round 2", 22.5, 14),
        ("checks", "checks", 28.5, 11),
        ("idle", "verifying", 36.5, 3),
        ("idle", "straggling", 39.5, 5),
        ("phases", "generate", 0.5, 44),
    ]
    levels = [(e["args"]["slots at work"], at(e)) for e in events if e["ph"] == "C"]
    first = levels[0][1]
    assert [(level, when - first) for level, when in levels] == [
        *((1, 0), (0.25, 10), (0, 14)),
        *((1, 22), (0.25, 32), (0, 36)),
    ]
    assert [e["args"] for e in events if e["ph"] == "i"] == [{"step": 7}]
    (moved,) = (e["args"] for e in events if e.get("cat") == "moves")
    wanted = {"leave": ["prm.weights"], "come": ["a", "engine.weights"], "bytes_to_host": 4096}
    assert moved == wanted


def test_a_long_tail_is_drawn_in_a_bounded_number_of_events(tmp_path: Path, clock: Clock) -> None:
    timeline = Timeline(Trace(tmp_path, 0, fresh=True), clock)
    timeline.generating(1024)
    for left in range(1023, -1, -1):
        clock.now += 0.01
        timeline.at_work(left)
    levels = [e["args"]["slots at work"] for e in written(timeline) if e["ph"] == "C"]
    assert levels[0] == 1
    assert levels[-1] == 0
    assert levels == sorted(levels, reverse=True)
    assert 10 <= len(levels) <= 18


def test_threads_may_tell_at_once(tmp_path: Path) -> None:
    timeline = Timeline(Trace(tmp_path, 0, fresh=True))

    def tell() -> None:
        for _ in range(300):
            timeline.generating(2)
            timeline.at_work(1)
            timeline.checked()
            with timeline.switching([], []):
                time.sleep(1e-5)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = [event for event in written(timeline) if event["name"] == "move"]
    assert len(moves) == 4 * 300


def written(timeline: Timeline) -> list[dict]:
    """The events in the file but for those that name ranks and lanes."""
    path = timeline.trace.path  # type: ignore[union-attr]
    timeline.close()
    lines = path.read_text().splitlines()[1:]
    return [e for line in lines if (e := json.loads(line.rstrip(",")))["ph"] != "M"]


def at(event: dict) -> float:
    """Its time in seconds, to the microsecond that Chrome's format has."""
    return event["ts"] / 1e6
