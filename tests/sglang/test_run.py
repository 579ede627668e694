"""Whole runs on real servers, and what becomes of them when a server is killed.

A response is sampled with random numbers of its own (seed, prompt, sample, position), so a run
that had to sample responses again has the same figures as one that had not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_prime.rollout.sglang_server import State

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("distributed", "end_to_end")]

from job import Job, layout, reproducible  # noqa: E402
from ranks import Ranks, outliving  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

WITHIN_S = 500.0


def knobs(tp: int, *more: str) -> list[str]:
    return [
        "--rollout.engine=sglang",
        f"--rollout.sglang_python={os.environ['SGLANG_PYTHON']}",
        f"--rollout.tensor_parallel_size={tp}",
        "--rollout.mismatch_alarm=1e-6",
        "--rollout.sync_timeout_s=60",
        "--debug.save_rollouts=true",
        "--run.steps=2",
        "--evaluate.every=0",
        "--checkpoint.every=0",
        *more,
    ]


TWO_RANKS = layout(tp=2, pp=1)
OFFLOADED = "--memory.offload=always"


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> dict[int, dict[str, float]]:
    """The figures of two ranks, TP 2, with one server over both, which gives its memory back
    between its uses, as all buffers of the trainer leave."""
    with Ranks(job, 2, "undisturbed", *knobs(2, *TWO_RANKS, OFFLOADED)) as ranks:
        assert ranks.codes(WITHIN_S) == [0, 0], ranks.said
    return job.metrics("undisturbed")


def test_a_run_samples_with_the_weights_of_each_step(undisturbed) -> None:
    for step in (1, 2):
        figures = undisturbed[step]
        assert figures["rollout/mismatch_max"] < 1e-4
        assert figures["rollout/mismatch_alarm"] == 0
        assert figures["rollout/server_restarts"] == figures["rollout/repeated_syncs"] == 0
        assert figures["filter/kept"] == 8
    assert undisturbed[0].keys() & {"evaluate/accuracy"}
    assert undisturbed[2]["policy/grad_norm"] > 0


# ------------------------------------------------------------------ killed servers


def in_generation(run: Path, alive: Callable[[], object]) -> None:
    """Kill the server as it begins to sample in step 2."""
    wait_until(lambda: '"step": 1,' in text_of(run / "metrics.jsonl"), alive)
    log = run / "engines" / "0" / "server.log"
    before = text_of(log).count("Prefill batch")
    wait_until(lambda: text_of(log).count("Prefill batch") > before, alive)
    os.kill(server_of(run).pid, signal.SIGKILL)


def between_steps(run: Path, alive: Callable[[], object]) -> None:
    """Kill the server while the trainer learns from the rollouts of step 1."""
    wait_until((run / "rollouts" / "step_000001.jsonl").exists, alive)
    os.kill(server_of(run).pid, signal.SIGKILL)


def in_a_sync(run: Path, alive: Callable[[], object]) -> None:
    """Stop the server before step 1's sync, and kill it when the trainer speaks to it again."""
    wait_until((run / "rollouts" / "step_000001.jsonl").exists, alive)
    server = server_of(run)
    server.suspend()
    port = (State.read(run / "engines" / "0" / "server.json") or State(0, 0, 0)).port
    wait_until(lambda: is_connected(port), alive)
    server.kill()


def is_connected(port: int) -> bool:
    """Whether somebody on this machine has called the port."""
    calls = psutil.net_connections("tcp")
    return any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in calls)


def server_of(run: Path) -> psutil.Process:
    state = State.read(run / "engines" / "0" / "server.json")
    assert state is not None
    process = state.process()
    assert process is not None
    return process


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def wait_until(reached: Callable[[], Any], alive: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not reached():
        alive()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def assert_survives(
    job: Job, undisturbed: dict, name: str, kill: Callable, *more: str, syncs: int
) -> None:
    with Ranks(job, 2, name, *knobs(2, *TWO_RANKS, *more)) as ranks:
        kill(ranks.folder, ranks._assert_running)
        assert ranks.codes(WITHIN_S) == [0, 0], ranks.said
    found = job.metrics(name)
    counted = {"rollout/server_restarts", "rollout/repeated_syncs", "rollout/continued_tokens"}
    total = {n: sum(record.get(n, 0) for record in found.values()) for n in counted}
    assert total == {
        "rollout/server_restarts": 1,
        "rollout/repeated_syncs": syncs,
        "rollout/continued_tokens": 0,
    }
    for step, record in undisturbed.items():
        assert record.keys() == found[step].keys()
        for figure, value in reproducible(record).items():
            if figure not in counted:
                assert found[step][figure] == pytest.approx(value, rel=1e-4, abs=1e-4), figure


@pytest.mark.slow
def test_a_server_killed_while_it_generates(job: Job, undisturbed) -> None:
    assert_survives(job, undisturbed, "generating", in_generation, OFFLOADED, syncs=0)


@pytest.mark.slow
def test_a_server_killed_between_steps(job: Job, undisturbed) -> None:
    """Noticed when it is to give its memory back, or to take it again: before the sync."""
    assert_survives(job, undisturbed, "between", between_steps, OFFLOADED, syncs=0)


@pytest.mark.slow
def test_a_server_killed_in_a_sync(job: Job, undisturbed) -> None:
    assert_survives(job, undisturbed, "syncing", in_a_sync, syncs=1)


# ------------------------------------------------------------------ other layouts and commands


@pytest.mark.slow
def test_other_layouts_sample_the_same(job: Job, undisturbed) -> None:
    """Four ranks, TP 2 × PP 2, two servers of two; two ranks, two servers of one."""
    for ranks, tp, sizes in ((4, 2, layout(tp=2, pp=2)), (2, 1, TWO_RANKS)):
        name = f"sglang_{ranks}_{tp}"
        with Ranks(job, ranks, name, *knobs(tp, *sizes)) as running:
            assert running.codes(WITHIN_S) == [0] * ranks, running.said
        first, found = undisturbed[1], job.metrics(name)[1]
        for figure in ("rollout/accuracy", "rollout/tokens", "filter/accuracy", "filter/generated"):
            assert found[figure] == first[figure], figure
        assert all(job.metrics(name)[step]["rollout/mismatch_max"] < 1e-4 for step in (1, 2))


@pytest.mark.slow
def test_no_server_outlives_a_killed_trainer(job: Job) -> None:
    with Ranks(job, 2, "killed_trainer", *knobs(1, *TWO_RANKS)) as ranks:
        ranks.wait_for_step(0)
        states = [State.read(ranks.folder / "engines" / str(i) / "server.json") for i in (0, 1)]
        servers = [state.process() for state in states if state is not None]
        family = [p for s in servers if s for p in (s, *s.children(recursive=True))]
        assert len(family) >= 6  # two servers, their schedulers and detokenizers
        for process in ranks.processes:
            process.kill()
        assert outliving(family, 30) == []


@pytest.mark.slow
def test_evaluating_and_sampling_a_checkpoints_files(job: Job) -> None:
    """The greedy answers are those of the local engine; `rollout` samples and verifies."""
    of_sglang = knobs(2, *TWO_RANKS)
    for name, more in (("by_sglang", of_sglang), ("by_local", [])):
        with Ranks(job, 2, name, *more, command="evaluate") as ranks:
            assert ranks.codes(WITHIN_S) == [0, 0], ranks.said
    told, found = (
        text_of(job.run(name) / "evaluation" / "answers.jsonl")
        for name in ("by_local", "by_sglang")
    )
    assert told.count("\n") == 12
    assert found == told
    with Ranks(job, 2, "sampled", *of_sglang, "--run.steps=1", command="rollout") as ranks:
        assert ranks.codes(WITHIN_S) == [0, 0], ranks.said
    assert text_of(job.run("sampled") / "rollouts" / "step_000001.jsonl").count("\n") == 12


@pytest.mark.slow
def test_benchmark_sets_are_answered_as_by_the_local_engine(job: Job) -> None:
    """Greedy answers agree; samples are as many, and of the servers' own random numbers."""
    more = [f"--evaluate.sets.digits={job.folder / 'eval.jsonl'}", "--evaluate.samples=3"]
    for name, engine in (("sets_sglang", knobs(2, *TWO_RANKS)), ("sets_local", [])):
        with Ranks(job, 2, name, *engine, *more, command="evaluate") as ranks:
            assert ranks.codes(WITHIN_S) == [0, 0], ranks.said
    folders = [job.run(name) / "evaluation" / "digits" for name in ("sets_local", "sets_sglang")]
    local, sglang = (text_of(folder / "greedy.jsonl") for folder in folders)
    assert local.count("\n") == 12
    assert sglang == local
    sampled = [json.loads(line) for line in text_of(folders[1] / "sampled.jsonl").splitlines()]
    assert [len(record["responses"]) for record in sampled] == [3] * 12
