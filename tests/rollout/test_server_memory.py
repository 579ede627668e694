"""Servers give their memory back between uses, whatever happens to them meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from fake_engine import PROMPTS, SAMPLING, Setting, check_groups, children
from fake_sglang import recorded

from megatron_prime.planner.residency import NEEDED
from megatron_prime.rollout.sglang_answers import SampleRequest
from megatron_prime.runtime.mover import Mover

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
PLANNED = {"engine.weights": 700, "engine.kv_cache": 300}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def make(tmp_path):
    made, before = [], children()

    def build(**faults):
        setting = Setting(tmp_path)
        engine = setting.engine(dist.HashStore(), **faults)
        made.append(engine)
        mover = Mover(None, torch.device("cpu"))
        for buffer in engine.buffers(PLANNED):
            mover.add(buffer)
        return setting, engine, mover

    yield build
    for engine in made:
        engine.close()
    assert children() <= before, "processes are left"


def calls(setting) -> list[dict]:
    lines = recorded(setting.server_folder(0) / "asked.jsonl")
    return [line for line in lines if "release" in line or "resume" in line]


def test_a_step_of_phases(make) -> None:
    setting, engine, mover = make()
    for version in (1, 2):
        mover.switch(NEEDED["sync_weights"])
        assert mover.on_device() == 700
        setting.load(engine, version)
        mover.switch(NEEDED["generate"])
        assert mover.on_device() == 1000
        groups = list(engine.generate(PROMPTS, SAMPLING))
        check_groups(groups, setting.digest(version), version)
        mover.switch(NEEDED["score"])
        assert mover.on_device() == 0
        assert engine.version == -1, "so that the next sync comes"
        with pytest.raises(RuntimeError, match="no weights"):
            engine.generate(PROMPTS, SAMPLING)
    first, *rest = calls(setting)
    step = [
        {"resume": ["cuda_graph"]},
        {"resume": ["kv_cache"]},
        {"release": ["weights"]},
        {"release": ["kv_cache"]},
        {"release": ["cuda_graph"]},
    ]
    assert [first, rest[0]] == [{"release": ["kv_cache"]}, {"release": ["cuda_graph"]}]
    assert rest[1:] == [*step, {"resume": ["weights"]}, *step]
    assert engine.take_metrics()["rollout/server_restarts"] == 0


def test_one_that_died_meanwhile_is_made_anew_and_holds_no_more_than_the_others(make) -> None:
    setting, engine, mover = make()
    setting.load(engine, 1)
    mover.switch(NEEDED["score"])
    os.kill(engine._group._server.pid, signal.SIGKILL)
    mover.switch(NEEDED["sync_weights"])
    assert calls(setting)[-1] == {"release": ["cuda_graph", "kv_cache"]}, "of the new process"
    setting.load(engine, 2)
    mover.switch(NEEDED["generate"])
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(2), 2)
    assert engine.take_metrics()["rollout/server_restarts"] == 1


@pytest.mark.parametrize("next_phase", ["sync_weights", "generate"])
def test_a_death_between_two_uses_is_made_good_before_the_next(make, next_phase) -> None:
    """`sync_weights` releases, `generate` resumes: that is where it is noticed."""
    setting, engine, mover = make()
    entered = []

    @contextmanager
    def for_sync():
        entered.append(sorted(mover.present))
        yield

    engine.for_sync = for_sync
    if next_phase == "generate":
        mover.switch(NEEDED["sync_weights"])
    setting.load(engine, 1)
    os.kill(engine._group._server.pid, signal.SIGKILL)
    mover.switch(NEEDED[next_phase])
    assert engine.version == 1
    mover.switch(NEEDED["generate"])
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(1), 1)
    assert len(entered) == 1
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(1), 1)
    assert len(entered) == 1


def test_weights_are_fetched_for_a_server_that_dies_while_it_generates(make) -> None:
    setting, engine, mover = make(die_after=2, starts=1)
    entered = []

    @contextmanager
    def for_sync():
        mover.switch(NEEDED["sync_weights"])
        entered.append(engine.memory.away.copy())
        yield
        mover.switch(NEEDED["generate"])

    engine.for_sync = for_sync
    setting.load(engine, 1)
    check_groups(list(engine.generate(PROMPTS, SAMPLING)), setting.digest(1), 1)
    assert entered == [{"kv_cache", "cuda_graph"}]
    assert engine.take_metrics()["rollout/server_restarts"] == 1


def test_waits_until_a_server_is_idle(make) -> None:
    setting, engine, mover = make(token_s=0.05)
    setting.load(engine, 1)
    request = SampleRequest("late", (5, 6, 7), 30, 1)
    running = engine._group.ask(engine._group.client.generate([request], 1.0, (), 20.0))
    engine._group.ask(asyncio.sleep(0.3)).result()
    assert not running.done()
    mover.switch(NEEDED["score"])
    (sample,) = running.result(1.0)
    assert len(sample.output_ids) == 30
    assert engine.take_metrics()["rollout/server_restarts"] == 0
