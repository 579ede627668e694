"""A server of two ranks, and that nothing of a server outlives what it belongs to."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_server import KEY, logprobs_of, send_weights, spec_of

import megatron_prime
from megatron_prime.rollout import sglang_server
from megatron_prime.rollout.sglang_client import SampleRequest, SglangClient
from megatron_prime.rollout.sglang_server import LeftOverServer, ServerNotStarted, SglangServer

TRAINER = """
import pickle, sys, time
from megatron_prime.rollout.sglang_server import SglangServer
server = SglangServer(pickle.load(open(sys.argv[1], "rb")))
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def gone_within(seconds: float, processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + seconds
    while any(not sglang_server._gone(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, model):
    """A server of two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    started = SglangServer(spec_of(folder, model[1], tp=2))
    try:
        started.start()
        started.ready()
        yield started
    finally:
        started.kill()


def test_two_ranks_share_the_model(pair, model) -> None:
    asyncio.run(send_weights(pair.url, model[0], tp=2, version="4"))

    async def job():
        async with SglangClient(pair.url, KEY) as client:
            return await client.generate([SampleRequest("r", [5, 6, 7], 12, 1)], 1.0, (), 120)

    (found,) = asyncio.run(job())
    assert found.weight_version == "4"
    assert found.logprobs == pytest.approx(
        logprobs_of(model[0], [5, 6, 7], found.output_ids), abs=1e-4
    )


def test_nobody_can_read_the_key(pair) -> None:
    processes = tree(pair.pid)
    assert len(processes) >= 4  # the server, two schedulers, the detokenizer
    assert not [p for p in processes if KEY in " ".join(p.cmdline())]
    assert not [p for p in processes if KEY in json.dumps(p.environ())]
    assert pair.log_file.stat().st_mode & 0o777 == 0o600
    assert KEY in pair.log_file.read_text()  # SGLang's doing
    assert KEY not in pair.log_tail(10_000)


def test_a_living_server_is_not_adopted(pair, monkeypatch) -> None:
    monkeypatch.setattr(sglang_server, "LEFT_OVER_GRACE_S", 0.5)
    with pytest.raises(LeftOverServer, match=f"kill -9 {pair.pid}"):
        SglangServer(pair.spec).start()


def test_a_killed_server_takes_its_processes_along(pair) -> None:
    processes = tree(pair.pid)
    os.kill(pair.pid, signal.SIGKILL)
    assert gone_within(10, processes[1:])
    assert not pair.alive()


@pytest.mark.parametrize("children", [1, 3])  # while it starts; with its scheduler on its way
def test_a_killed_trainer_takes_the_server_along(tmp_path, model, children) -> None:
    file = tmp_path / "spec"
    file.write_bytes(pickle.dumps(spec_of(tmp_path, model[1])))
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(file)],
        stdout=subprocess.PIPE,
        cwd=Path(megatron_prime.__file__).parents[1],
    )
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    deadline = time.monotonic() + 120
    while len(tree(pid)) < children and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = tree(pid)
    assert len(processes) >= children
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert gone_within(10, processes)


def test_an_option_that_sglang_does_not_have_is_called_by_name(tmp_path, model) -> None:
    options = {"mem_fraction_statik": 0.5}
    server = SglangServer(spec_of(tmp_path, model[1], options=options))
    server.start()
    try:
        with pytest.raises(ServerNotStarted, match="did you mean mem_fraction_static"):
            server.ready()
    finally:
        server.kill()
