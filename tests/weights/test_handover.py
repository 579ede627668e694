"""Both sides of the hand-over on one piece of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_prime.weights.handover import Handover, HandoverError, HandoverLayout, Placed

CPU = torch.device("cpu")
ROUNDS, NBYTES = 5, 1001
LAYOUT = HandoverLayout(
    parameters={"a": [2, 3], "b.weight": [4]},
    dtypes={"a": "float32", "b.weight": "bfloat16"},
    rounds=[[Placed("a", [[0, 1], [0, 3]], 16 * i, "float32")] for i in range(ROUNDS)],
    buffer_bytes=NBYTES,
    timeout_s=20.0,
)


@pytest.fixture
def trainer() -> Iterator[Handover]:
    handover = Handover.create(LAYOUT, CPU)
    yield handover
    handover.close()


@pytest.fixture
def engine(trainer: Handover) -> Handover:
    return Handover.open(trainer.ticket, CPU)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def alive() -> bool:
    return True


def content(sync: int, round_: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * sync + round_)
    return torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=generator)


def load(engine: Handover, sync: int, slow: float = 0) -> list[torch.Tensor] | None:
    """An engine's part: what it saw in each round; None if the sync was given up."""
    seen = []
    for round_ in range(ROUNDS):
        if not engine.wait_published(sync, round_):
            return None
        time.sleep(slow)
        seen.append(engine.buffers[round_ % 2].clone())
        engine.checksums[round_] = 1000 * sync + round_
        engine.loaded(round_)
    engine.done()
    return seen


def send(trainer: Handover, sync: int) -> list[int]:
    """A trainer's part, after `begin`: returns the engine's checksums."""
    for round_ in range(ROUNDS):
        trainer.wait_free(round_, 20, alive)
        trainer.buffers[round_ % 2].copy_(content(sync, round_))
        trainer.publish(round_)
    return trainer.wait_done(20, alive)


@pytest.mark.parametrize("slow", [0, 0.01], ids=["fast engine", "slow engine"])
def test_every_round_arrives_in_order_and_whole(trainer, engine, thread, slow) -> None:
    for sync in (1, 2, 3):
        trainer.begin(sync)
        loading = thread.submit(load, engine, sync, slow)
        assert send(trainer, sync) == [1000 * sync + i for i in range(ROUNDS)]
        seen = loading.result()
        assert seen is not None
        assert all(torch.equal(seen[i], content(sync, i)) for i in range(ROUNDS))
        trainer.give_up()  # what a sync that went well ends with, too


def test_the_engine_gets_the_trainers_layout(engine: Handover) -> None:
    assert engine.layout == LAYOUT
    assert engine.layout.pieces == ROUNDS


def test_buffers_are_apart_and_may_hold_any_type(trainer: Handover, engine: Handover) -> None:
    trainer.buffers[0].fill_(1)
    trainer.buffers[1].fill_(2)
    for first, second in (trainer.buffers, engine.buffers):
        assert first.numel() == second.numel() == NBYTES
        assert bool((first == 1).all())
        assert bool((second == 2).all())
        assert first.data_ptr() % 4096 == second.data_ptr() % 4096 == 0
        second[: NBYTES // 8 * 8].view(torch.int64)  # an odd length between them does not matter


def test_a_buffer_is_not_filled_before_it_is_loaded(trainer: Handover, engine: Handover) -> None:
    trainer.begin(1)
    for round_ in (0, 1):
        trainer.wait_free(round_, 0.1, alive)
        trainer.publish(round_)
    with pytest.raises(HandoverError, match=r"within 0\.05 s.*rollout\.sync_timeout_s"):
        trainer.wait_free(2, 0.05, alive)
    assert engine.wait_published(1, 0)
    engine.loaded(0)
    trainer.wait_free(2, 0.05, alive)
    with pytest.raises(HandoverError):
        trainer.wait_free(3, 0.05, alive)


def test_an_engine_that_waits_returns_when_the_sync_is_given_up(trainer, engine, thread) -> None:
    trainer.begin(1)
    trainer.publish(0)
    loading = thread.submit(load, engine, 1)
    wait_for(lambda: int(engine._header[2]) == 2**32 + 1)  # round 0 of sync 1 is loaded
    assert not loading.done()
    trainer.give_up()
    assert loading.result(timeout=5) is None


def test_a_loader_of_the_last_sync_leaves_the_next_alone(trainer, engine, thread) -> None:
    """It was given up in the middle, and tells what it did when the next one has begun."""
    trainer.begin(1)
    trainer.publish(0)
    assert engine.wait_published(1, 0)
    trainer.give_up()
    trainer.begin(2)
    engine.loaded(0)
    engine.loaded(3)
    engine.done()  # late news, all of sync 1
    for reach in (
        lambda: trainer.wait_free(2, 0.05, alive),
        lambda: trainer.wait_done(0.05, alive),
    ):
        with pytest.raises(HandoverError, match="within"):
            reach()
    engine.failed(1, "too late")
    with pytest.raises(HandoverError, match="within"):
        trainer.wait_done(0.05, alive)
    assert not engine.wait_published(1, 1)
    loading = thread.submit(load, engine, 2)
    assert send(trainer, 2) == [2000 + i for i in range(ROUNDS)]
    assert torch.equal(loading.result()[4], content(2, 4))


def test_what_the_engine_says_of_its_failure_is_told(trainer: Handover, engine: Handover) -> None:
    trainer.begin(1)
    engine.failed(1, "a.weight: found ½")
    with pytest.raises(HandoverError, match=r"could not load new weights: a\.weight: found ½$"):
        trainer.wait_free(2, 5, alive)
    trainer.begin(2)
    engine.failed(2, "é" * 2**20)  # twice the room, cut in the middle of a letter
    with pytest.raises(HandoverError, match="ééé"):
        trainer.wait_done(5, alive)
    assert engine.layout == Handover.open(trainer.ticket, CPU).layout  # which lies behind it


def test_a_dead_engine_is_noticed_before_the_time_is_up(trainer: Handover) -> None:
    trainer.begin(1)
    started = time.monotonic()
    with pytest.raises(HandoverError, match="died"):
        trainer.wait_done(60, lambda: False)
    assert time.monotonic() - started < 5


def test_an_engine_that_died_after_its_last_word_has_done_its_part(trainer, engine) -> None:
    trainer.begin(1)
    trainer.publish(0)
    assert engine.wait_published(1, 0)

    def dies_when_done() -> bool:
        engine.done()
        return False

    trainer.wait_done(5, dies_when_done)


def test_an_engine_does_not_wait_for_ever(trainer: Handover) -> None:
    layout = HandoverLayout({}, {}, [[]], 1, timeout_s=0.05)
    short = Handover.create(layout, CPU)
    short.begin(1)
    with pytest.raises(HandoverError, match=r"no round 0 within 0\.05 s"):
        Handover.open(short.ticket, CPU).wait_published(1, 0)


def test_the_file_is_closed_with_the_handover(trainer: Handover, engine: Handover) -> None:
    def memfds() -> int:
        folder = Path("/proc/self/fd")
        return sum(
            "megatron_prime_handover" in os.readlink(link)
            for link in folder.iterdir()
            if link.is_symlink()
        )

    before = memfds()
    handover = Handover.create(LAYOUT, CPU)
    assert memfds() > before
    del handover
    assert memfds() == before
    trainer.buffers[0].fill_(3)
    trainer.close()
    trainer.close()
    assert bool((engine.buffers[0] == 3).all())  # what is open stays so
    with pytest.raises(HandoverError, match="memory is not at"):
        Handover.open(trainer.ticket, CPU)


def test_a_ticket_that_leads_to_something_else_is_refused(trainer, tmp_path: Path) -> None:
    ticket = json.loads(trainer.ticket)
    other = Handover.create(
        LAYOUT, CPU
    )  # as when the number of the trainer's process was given anew
    (tmp_path / "short").write_text("abc")
    for path in (json.loads(other.ticket)["path"], str(tmp_path / "short"), str(tmp_path), "/no"):
        with pytest.raises(HandoverError, match="namespace of processes"):
            Handover.open(json.dumps(ticket | {"path": path}), CPU)


TRAINER = """
import sys, time, torch
from megatron_prime.weights.handover import Handover, HandoverLayout
handover = Handover.create(HandoverLayout({}, {}, [[]], 4096, 5.0), torch.device("cpu"))
handover.buffers[0].fill_(9)
handover.begin(1)
handover.publish(0)
print(handover.ticket, flush=True)
time.sleep(60)
"""


def test_a_killed_trainer_leaves_nothing_behind() -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    process = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ticket = process.stdout.readline()
        handover = Handover.open(ticket, CPU)
        assert handover.wait_published(1, 0)
        assert bool((handover.buffers[0] == 9).all())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    after = set(shared.iterdir()) if shared.is_dir() else set()
    assert not {path for path in after - before if "megatron_prime" in path.name}
    assert bool((handover.buffers[0] == 9).all())  # an engine that still reads does not crash
    with pytest.raises(HandoverError, match="memory is not at"):
        Handover.open(ticket, CPU)


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)
