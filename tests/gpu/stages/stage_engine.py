"""Stage 3, engine: a real SGLang server beside the trainer on one device.

Handles of the trainer's buffers go to the server (CUDA IPC; shared memory on a CPU), the loader
inside it copies, both sides take checksums. Then: do both compute the same log-probs, before and
after an update; does memory that the server gives back really get free; do twenty rounds of
switching leave anything behind; does it come back after kill -9, with the weights it should have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
from stage_colocated import Colocated, as_batch, colocated
from stage_measure import GIB, device_used
from stage_pytest import run_file
from stage_report import Stage
from stage_sizes import config_of, model_folder, sglang_missing

from megatron_prime.config import RunConfig
from megatron_prime.protocols import Phase

ROUNDS, SETTLED = 20, 5  # of switching; growth counts from the fifth
GROWTH = 64 * 2**20  # bytes: blocks of the allocators
CLOSE = 1e-6  # nats per token, mismatch in fp32
FREED = 0.95  # of the planned bytes
MIB = 2**20


def config_for(stage: Stage, model: Path, name: str, fp8_weights: bool = False) -> RunConfig:
    """A few prompts with short answers; everything leaves that is not needed."""
    tokens = 32 if stage.small else 256
    return config_of(
        stage,
        model,
        name,
        rollout={
            "prompts_per_step": 8,
            "max_response_length": tokens,
            "fp8_weights": fp8_weights,
            "hang_timeout_s": 60.0,
            "sync_bucket_mib": 1.0 if stage.small else 256.0,
        },
        # Two mini-batches, so that scoring finds the policy on the device; and a rate that bf16
        # weights of this size can follow.
        policy={"mini_batch_size": 16, "lr": 1e-3 if stage.small else 3e-4},
        prm={"mini_batch_size": 32},
        memory={"offload": "always"},
        sglang={"max_total_tokens": 64 * (tokens + 64), **few_graphs(stage)},
    )


def few_graphs(stage: Stage) -> dict[str, int]:
    """Captured for small batches only: the server starts twice here."""
    return {"cuda_graph_max_bs_decode": 8} if stage.on_gpu else {}


def engine(stage: Stage) -> None:
    """All that one server has to show."""
    model = model_folder(stage, *(("tiny", 2) if stage.small else ("1.5B", 8)))
    with colocated(config_for(stage, model, "engine")) as run:
        run.sync()
        checksums(stage, run)
        for name, work in {
            "log-probs agree": agreement,
            "memory is really freed": released,
            "switching leaves nothing behind": switches,
            "restart after kill -9": restart,
        }.items():
            if not stage.attempt(name, work, stage, run):
                return  # phases are somewhere in the middle


def checksums(stage: Stage, run: Colocated) -> None:
    """Of the first sync: nothing had to be sent twice."""
    found = run.engine.take_metrics()
    twice = found["rollout/repeated_syncs"] + found["rollout/server_restarts"]
    stage.check("syncs that had to be repeated", f"{twice:g}", "0", twice == 0)


def agreement(stage: Stage, run: Colocated) -> None:
    """Before and after an update of all weights; stale weights would show."""
    bound = (run.config.rollout.mismatch_alarm or 0.05) if stage.on_gpu else CLOSE
    before = as_batch(run.generate(8))
    found: dict[str, float] = {}
    run.train(before, lambda: found.update(run.mismatch(before)))
    stage.at_most("mismatch_kl, first weights", found["mismatch_kl"], bound, "nats/token")
    stage.measured("mismatch_max, first weights", found["mismatch_max"], "nats")
    run.sync()
    after = as_batch(run.generate(8))
    with run.phase(Phase.SCORE):
        found, moved = run.mismatch(after), run.mismatch(before)
    stage.at_most("mismatch_kl, after an update", found["mismatch_kl"], bound, "nats/token")
    least = 2 * found["mismatch_kl"]
    stage.check(
        "the update moved log-probs more than that",
        f"{moved['mismatch_kl']:.3g} nats/token",
        f"> {least:.3g}",
        moved["mismatch_kl"] > least,
    )
    with run.phase(Phase.UPDATE_POLICY):
        pass
    run.sync()


def released(stage: Stage, run: Colocated) -> None:
    """The driver's word before and after the server releases, against the plan's bytes."""
    planned = run.gpus.limits.planned
    memory = run.engine.memory
    with run.phase(Phase.GENERATE):
        free_and_take_back(stage, memory, "kv_cache", planned.get("engine.kv_cache", 0))
    with run.phase(Phase.UPDATE_POLICY):
        pass
    with run.phase(Phase.SYNC_WEIGHTS):
        free_and_take_back(stage, memory, "weights", planned.get("engine.weights", 0))
        run.engine.load_weights(run.policy.weights(), run.policy.version)


def free_and_take_back(stage: Stage, memory, tag: str, planned: int) -> None:
    """One tag, twice: what went must have come back."""
    before = device_used()
    memory.release(tag)
    freed = before - device_used()
    memory.resume(tag)
    again = device_used() - before
    stage.on_cuda(f"{tag}: freed, of {planned / GIB:.2f} GiB planned", freed / max(1, planned), "%", FREED)  # fmt: skip # noqa: E501
    stage.on_cuda(f"{tag}: more in use after it came back", again / MIB, "MiB", most=GROWTH / MIB)


def switches(stage: Stage, run: Colocated) -> None:
    """Rounds of all phases with a sync in each, and nothing else."""
    run.gpus.take_seconds()
    first = last = (0, 0, 0)
    for number in range(ROUNDS):
        for phase in (Phase.GENERATE, Phase.SCORE, Phase.UPDATE_PRM, Phase.UPDATE_POLICY):
            with run.phase(phase):
                pass
        run.sync()
        last = in_use(run)
        first = last if number < SETTLED else first
    device, mine, server = (b - a for a, b in zip(first, last, strict=True))
    seconds = run.gpus.take_seconds()
    stage.on_cuda("device memory grown over 20 rounds", device / MIB, "MiB", most=GROWTH / MIB)
    stage.at_most("the trainer grown over 20 rounds", mine / MIB, GROWTH / MIB, "MiB")
    stage.at_most("the server grown over 20 rounds", server / MIB, GROWTH / MIB, "MiB")
    each = seconds["time/switch_s"] / ROUNDS
    stage.on_cuda("switches of a round", each, "s")
    found = run.engine.take_metrics()
    stage.check(
        "syncs repeated, servers restarted meanwhile",
        f"{found['rollout/repeated_syncs'] + found['rollout/server_restarts']:g}",
        "0",
        not (found["rollout/repeated_syncs"] or found["rollout/server_restarts"]),
    )


def in_use(run: Colocated) -> tuple[int, int, int]:
    """Bytes of the device, of this process, of the server's processes."""
    server = psutil.Process(run.server_pid())
    family = [server, *server.children(recursive=True)]
    resident = sum(one.memory_info().rss for one in family)
    return device_used(), psutil.Process().memory_info().rss, resident


def restart(stage: Stage, run: Colocated) -> None:
    """The server is killed; the next round finds a new one with the weights of now."""
    killed = run.kill_server()
    batch = as_batch(run.generate(8))
    found = run.engine.take_metrics()
    stage.check(
        "servers restarted after kill -9",
        f"{found['rollout/server_restarts']:g}",
        "1",
        found["rollout/server_restarts"] == 1 and run.server_pid() != killed,
    )
    answered = len(batch.sequences) / run.config.rollout.group_size
    stage.check("prompts answered after it", f"{answered:g}", "8", answered == 8)
    stage.on_cuda("kill -9 to all answers", run.watched["generate"].seconds, "s")
    bound = (run.config.rollout.mismatch_alarm or 0.05) if stage.on_gpu else CLOSE
    with run.phase(Phase.SCORE):
        kl = run.mismatch(batch)["mismatch_kl"]
    stage.at_most("mismatch_kl of the new server", kl, bound, "nats/token")


def main(arguments: list[str] | None = None) -> int:
    """All checks of the stage."""
    stage = Stage.of_arguments("engine", arguments)
    stage.part("a sync between two processes", 15, run_file, "test_cuda_handover.py")
    if why := sglang_missing():
        stage.skip("a server beside the trainer", "", why)
    else:
        stage.part("a server beside the trainer", 80, engine)
    return stage.finish()


if __name__ == "__main__":
    sys.exit(main())
