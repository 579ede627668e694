"""Phases follow each other as the table says, move what they must, and are measured."""

from __future__ import annotations

import json
from contextlib import contextmanager

import psutil
import pytest
import torch

from megatron_prime.planner.residency import MOVES, NEEDED, RESIDENT, START
from megatron_prime.protocols import Phase
from megatron_prime.runtime import scheduler as module
from megatron_prime.runtime.ledger import LedgerError, Limits
from megatron_prime.runtime.memory import Buffer, Kept, Lent, Remade, Slabs, Storages
from megatron_prime.runtime.mover import BudgetExceeded
from megatron_prime.runtime.scheduler import DeviceFull, IllegalMove, PhaseScheduler
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.runtime.trace import Trace

CPU = torch.device("cpu")


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def resident():
    return PhaseScheduler(Limits(RESIDENT), CPU)


def spend(scheduler, clock, phase, seconds):
    with scheduler.phase(phase):
        clock.now += seconds


def walk(scheduler, *phases):
    for phase in phases:
        with scheduler.phase(phase):
            pass


def test_adds_up_the_seconds_of_each_phase(clock):
    scheduler = resident()
    spend(scheduler, clock, Phase.GENERATE, 2.0)
    clock.now += 50.0  # between phases: nobody's
    spend(scheduler, clock, Phase.SCORE, 1.5)
    spend(scheduler, clock, Phase.UPDATE_POLICY, 1.0)
    spend(scheduler, clock, Phase.GENERATE, 0.25)
    assert scheduler.take_seconds() == {
        "time/generate_s": 2.25,
        "time/score_s": 1.5,
        "time/update_policy_s": 1.0,
        "time/switch_s": 0.0,
    }
    assert scheduler.take_seconds() == {}


def test_tells_which_phase_begins(clock):
    told = []
    scheduler = resident()
    scheduler.on_phase = lambda phase: told.append((phase, clock.now))
    spend(scheduler, clock, Phase.GENERATE, 2.0)
    spend(scheduler, clock, Phase.SCORE, 1.0)
    assert told == [(Phase.GENERATE, 100.0), (Phase.SCORE, 102.0)]


@pytest.mark.parametrize("inner", [Phase.SCORE, Phase.GENERATE])
def test_a_phase_inside_a_phase_is_an_error(inner):
    scheduler = resident()
    with (
        scheduler.phase(Phase.GENERATE),
        pytest.raises(IllegalMove, match=f"phase {inner.value} began inside phase generate"),
        scheduler.phase(inner),
    ):
        raise AssertionError("the inner phase must not begin")


def test_every_move_that_is_not_in_the_table_is_refused_by_name():
    for before, legal in MOVES.items():
        for after in Phase:
            scheduler = resident()
            scheduler._last = before
            if after.value in legal:
                walk(scheduler, after)
            else:
                with pytest.raises(IllegalMove, match=f"phase {after.value} can't follow {before}"):
                    walk(scheduler, after)


def test_a_step_is_legal_with_and_without_a_reward_model():
    assert set(MOVES) == {phase.value for phase in Phase} | {START}
    prime = (Phase.GENERATE, Phase.SCORE, Phase.UPDATE_PRM, Phase.UPDATE_POLICY, Phase.SYNC_WEIGHTS)
    outcome_only = (Phase.GENERATE, Phase.SCORE, Phase.UPDATE_POLICY, Phase.SYNC_WEIGHTS)
    end = (Phase.EVALUATE, Phase.CHECKPOINT, Phase.CHECKPOINT)
    walk(resident(), Phase.SYNC_WEIGHTS, Phase.EVALUATE, *prime, *outcome_only, *end)


def test_an_error_ends_the_phase_and_its_time_counts(clock):
    scheduler = resident()

    @scheduler.phase(Phase.GENERATE)
    def fail():
        clock.now += 4.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    spend(scheduler, clock, Phase.SCORE, 1.0)
    seconds = scheduler.take_seconds()
    assert (seconds["time/generate_s"], seconds["time/score_s"]) == (4.0, 1.0)


def test_waits_for_the_gpu_before_it_stops_the_clock(clock, monkeypatch):
    def finish_queued_work():
        clock.now += 7.0

    scheduler = resident()
    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "synchronize", finish_queued_work)
    spend(scheduler, clock, Phase.GENERATE, 1.0)
    assert scheduler.take_seconds()["time/generate_s"] == 8.0


def test_a_phase_has_a_deadline_and_a_place_in_the_timeline(clock):
    """Until the GPU is done, also when it ends with an error."""
    heard = []

    class Watcher:
        def __init__(self, name):
            self.name = name

        @contextmanager
        def phase(self, phase):
            heard.append((self.name, "begin", phase, clock.now))
            try:
                yield
            finally:
                heard.append((self.name, "end", phase, clock.now))

        def take_seconds(self):
            return {"time/idle_verifying_s": 0.5}

    scheduler = resident()
    scheduler.timeline, scheduler.deadlines = Watcher("timeline"), Watcher("deadlines")

    @scheduler.phase(Phase.GENERATE)
    def fail():
        clock.now += 2.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(heard) == [
        (name, edge, Phase.GENERATE, 100.0 + 2.0 * (edge == "end"))
        for name in ("deadlines", "timeline")
        for edge in ("begin", "end")
    ]
    seconds = scheduler.take_seconds()
    assert (seconds["time/generate_s"], seconds["time/idle_verifying_s"]) == (2.0, 0.5)


def test_a_switch_is_idle_time_and_told_to_the_timeline(tmp_path) -> None:
    _, buffers = model()
    scheduler = PhaseScheduler(Limits(NEEDED), CPU)
    scheduler.add(buffers)
    scheduler.timeline = Timeline(Trace(tmp_path, 0, fresh=True))
    walk(scheduler, Phase.GENERATE, Phase.SCORE)
    seconds = scheduler.take_seconds()
    assert seconds["time/switch_s"] > 0
    path = scheduler.timeline.trace.path
    scheduler.timeline.close()
    events = [json.loads(line.rstrip(",")) for line in path.read_text().splitlines()[1:]]
    moments, *weights = names = sorted(buffer.name for buffer in buffers)
    assert [event["args"] for event in events if event.get("cat") == "moves"] == [
        {"leave": names, "come": [], "bytes_to_host": 16000, "bytes_to_device": 0},
        {"leave": [], "come": weights, "bytes_to_host": 0, "bytes_to_device": 8000},
    ]
    assert moments == "policy.moments"


def test_peak_memory_is_this_process() -> None:
    peak = resident().take_memory()["memory/host_peak_gib"] * 2**30
    now = psutil.Process().memory_info().rss
    assert 0.95 * now <= peak < 100 * 2**30


def pieces_of(kind, tensor):
    return Slabs(lambda: [tensor]) if kind is Lent else Storages(kind, lambda: [tensor])


def model(values=1000):
    """Moments and weights of a policy, weights of a reference."""
    tensors = {
        "policy.moments": torch.randn(2 * values),
        "policy.weights": torch.randn(values),
        "reference.weights": torch.randn(values),
    }
    kinds = {"policy.moments": Lent, "policy.weights": Kept, "reference.weights": Kept}
    return tensors, [
        Buffer(name, pieces_of(kinds[name], tensor)) for name, tensor in tensors.items()
    ]


def test_a_phase_finds_what_it_needs_and_no_more() -> None:
    tensors, buffers = model()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    scheduler = PhaseScheduler(Limits(NEEDED, starts_empty=True), CPU)
    scheduler.add(buffers)
    scheduler.make_room()
    found = {}
    for phase in (Phase.GENERATE, Phase.SCORE, Phase.UPDATE_PRM, Phase.UPDATE_POLICY):
        with scheduler.phase(phase):
            found[phase] = {buffer.name for buffer in buffers if buffer.held()[0]}
            if phase == Phase.UPDATE_POLICY:
                assert torch.equal(tensors["policy.weights"], before["policy.weights"])
                tensors["policy.weights"] += 1
    weights, moments = "policy.weights", "policy.moments"
    assert found == {
        Phase.GENERATE: set(),
        Phase.SCORE: {weights, "reference.weights"},
        Phase.UPDATE_PRM: set(),
        Phase.UPDATE_POLICY: {weights, moments},
    }
    figures = scheduler.take_memory()
    assert figures["memory/score_device_gib"] == 8000 / 2**30
    assert figures["memory/moved_to_host_gib"] == 16000 / 2**30, "all, once"
    assert figures["memory/moved_to_device_gib"] == (8000 + 12000) / 2**30
    walk(scheduler, Phase.CHECKPOINT, Phase.GENERATE, Phase.SCORE)
    assert torch.equal(tensors["policy.weights"], before["policy.weights"] + 1)
    assert torch.equal(tensors["reference.weights"], before["reference.weights"])
    again = scheduler.take_memory()
    assert again["memory/moved_to_host_gib"] == 12000 / 2**30, "what the update may have changed"


def test_at_the_start_a_model_makes_room_and_a_checkpoint_visits_it() -> None:
    tensors, buffers = model()
    scheduler = PhaseScheduler(Limits(NEEDED, starts_empty=True), CPU)
    scheduler.add(buffers)
    scheduler.make_room()
    assert all(buffer.held()[0] == 0 for buffer in buffers)
    with scheduler.visit("policy"):
        there = {buffer.name for buffer in buffers if buffer.held()[0]}
        assert there == {"policy.weights", "policy.moments"}
        tensors["policy.weights"].fill_(5.0)
        tensors["policy.moments"].fill_(6.0)
    assert all(buffer.held()[0] == 0 for buffer in buffers)
    with scheduler.phase(Phase.GENERATE):
        pass
    with scheduler.phase(Phase.UPDATE_POLICY):
        assert bool((tensors["policy.weights"] == 5.0).all())
        assert bool((tensors["policy.moments"] == 6.0).all())
    stays = resident()
    stays.add(buffers)
    stays.make_room()
    with stays.visit("policy"):
        pass
    assert stays.take_memory()["memory/moved_to_host_gib"] == 0, "where all fits nothing moves"


def test_memory_that_the_allocator_did_not_get_back_is_noticed(monkeypatch) -> None:
    """A second reference to a moment: its piece is away, its bytes are not."""
    allocated = [10 * 2**30]
    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(module.torch.cuda, "memory_allocated", lambda: allocated[0])
    moments = torch.zeros(2**26)  # 256 MiB
    scheduler = PhaseScheduler(Limits(NEEDED), CPU)
    scheduler.add([Buffer("policy.moments", Slabs(lambda: [moments]))])
    with pytest.raises(
        LedgerError, match=r"got back 0 bytes of the 268435456 that left in generate"
    ):
        walk(scheduler, Phase.GENERATE)


def test_buffers_that_have_no_room_are_refused_with_the_table() -> None:
    _, buffers = model()
    scheduler = PhaseScheduler(Limits(NEEDED, budget=11_000), CPU)
    scheduler.add(buffers)
    walk(scheduler, Phase.GENERATE, Phase.SCORE)
    with pytest.raises(BudgetExceeded) as caught:
        walk(scheduler, Phase.UPDATE_POLICY)
    text = str(caught.value)
    assert text.startswith(
        "update_policy exceeds memory.device_gib less memory.reserve_gib: no roo"
    )
    assert "policy.moments" in text
    assert "policy.micro_batch_tokens" in text


def test_no_room_to_work_in_is_refused_before_the_work_begins() -> None:
    _, buffers = model()
    limits = Limits(NEEDED, budget=12_000, work={"score": 4001, "update_policy": 0})
    scheduler = PhaseScheduler(limits, CPU)
    scheduler.add(buffers)
    walk(scheduler, Phase.GENERATE)
    with (
        pytest.raises(BudgetExceeded, match=r"score exceeds .* work with"),
        scheduler.phase(Phase.SCORE),
    ):
        raise AssertionError("the work must not begin")
    limits = Limits(NEEDED, budget=12_000, work={"score": 4000})
    scheduler = PhaseScheduler(limits, CPU)
    scheduler.add(model()[1])
    walk(scheduler, Phase.GENERATE, Phase.SCORE, Phase.UPDATE_POLICY)


def test_out_of_memory_tells_who_holds_what() -> None:
    _, buffers = model()
    scheduler = PhaseScheduler(Limits(RESIDENT, planned={"policy.moments": 8000}), CPU)
    scheduler.add(buffers)
    with (
        pytest.raises(DeviceFull, match=r"out of memory in generate: .*allocate") as caught,
        scheduler.phase(Phase.GENERATE),
    ):
        torch.empty(2**58, dtype=torch.uint8)
    assert "reference.weights" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="size of tensor"), scheduler.phase(Phase.SCORE):
        torch.zeros(2) + torch.zeros(3)


def test_a_buffer_that_does_not_leave_is_noticed() -> None:
    class Stays(Remade):
        def free(self):
            pass

    tensor = torch.zeros(10)
    scheduler = PhaseScheduler(Limits(NEEDED), CPU)
    scheduler.add([Buffer("prm.gradients", Storages(Stays, lambda: [tensor]))])
    with pytest.raises(LedgerError, match=r"prm.gradients has 40 bytes on the device in generate"):
        walk(scheduler, Phase.GENERATE)


def test_a_server_made_anew_while_it_generates_finds_the_weights_as_in_a_sync() -> None:
    tensors, buffers = model()
    before = tensors["policy.weights"].clone()
    scheduler = PhaseScheduler(Limits(NEEDED), CPU)
    scheduler.add(buffers)
    weights = next(buffer for buffer in buffers if buffer.name == "policy.weights")
    with scheduler.phase(Phase.GENERATE):
        assert weights.held()[0] == 0
        with scheduler.as_in(Phase.SYNC_WEIGHTS):
            assert torch.equal(tensors["policy.weights"], before)
        assert weights.held()[0] == 0
    walk(scheduler, Phase.SCORE)
