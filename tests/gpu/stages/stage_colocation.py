"""Stage 4, colocation: policy, PRM, reference and server take turns on one device.

`memory.offload = "always"`: each phase finds what it needs and nothing more, so each switch moves
as much as it ever can. Peaks are set against the planner's figures, moves against plain page-locked
copies, a sync against a copy within the device of as many bytes.
"""

from __future__ import annotations

import sys

from bench_scheduler import copy_rates
from stage_colocated import Colocated, colocated
from stage_measure import GIB, copy_seconds
from stage_pytest import run_file
from stage_report import Stage
from stage_sizes import config_of, model_folder, sglang_missing, shapes_of

from megatron_prime.config import RunConfig
from megatron_prime.protocols import Phase

CLOSE = 0.05  # peak against plan
OF_A_COPY = 0.5  # reshard against a copy within the device
OF_PINNED = 0.9  # our moves against a plain page-locked copy
BUFFERS = 0.01  # what the ledger allows between buffers and plan
WORKING = (Phase.SCORE, Phase.UPDATE_PRM, Phase.UPDATE_POLICY, Phase.SYNC_WEIGHTS)


def config_for(stage: Stage, name: str, layers: int) -> RunConfig:
    """Packs that are full, and nearly all of them responses, as the plan takes them to be."""
    model = model_folder(stage, name, layers)
    response = 32 if stage.small else 1008
    return config_of(
        stage,
        model,
        f"colocation_{name}",
        rollout={"prompts_per_step": 8, "max_response_length": response},
        data={"max_prompt_length": 16},
        policy={"mini_batch_size": 32, "micro_batch_tokens": 8 * (response + 16)},
        prm={"mini_batch_size": 32, "micro_batch_tokens": 8 * (response + 16)},
        memory={"offload": "always"},
        sglang={"max_total_tokens": 40 * (response + 64)},
    )


def colocation(stage: Stage, name: str, layers: int) -> None:
    """Two steps, of which the second is looked at: moments come with the first."""
    label = f"{name}, {layers} layers"
    with colocated(config_for(stage, name, layers)) as run:
        run.sync()
        run.step(8)
        run.gpus.take_seconds()
        run.gpus.take_memory()
        run.step(8)
        seconds, memory = run.gpus.take_seconds(), run.gpus.take_memory()
        peaks(stage, run, label, memory)
        stage.on_cuda(f"{label}: switches of a step", seconds["time/switch_s"], "s")
        for phase in ("generate", *(phase.value for phase in WORKING)):
            stage.on_cuda(f"{label}: {phase}", run.watched[phase].seconds, "s")
        for where in ("host", "device"):
            moved = memory[f"memory/moved_to_{where}_gib"]
            stage.measured(f"{label}: moved to the {where} in a step", moved, "GiB")
        reshard(stage, run, label)
        stage.attempt(f"{label}: bandwidth", bandwidth, stage, run, label)


def peaks(stage: Stage, run: Colocated, label: str, memory: dict[str, float]) -> None:
    """Per phase: what buffers held, and the most that torch gave out, against the plan."""
    limits = run.gpus.limits
    for phase in WORKING:
        row = limits.table[phase.value]
        resident = {k: n for k, n in limits.planned.items() if k in row and n}
        ours = sum(n for k, n in resident.items() if not k.startswith("engine."))
        beside = limits.planned.get("sync.buffers", 0)  # the ledger knows nothing of them
        of_engine = sum(resident.values()) - ours if stage.on_gpu else 0
        wanted = (ours - beside + of_engine) / GIB
        held = memory[f"memory/{phase.value}_device_gib"]
        stage.at_most(
            f"{label}: buffers in {phase.value}, distance from the {wanted:.4g} GiB planned",
            abs(held / wanted - 1),
            BUFFERS,
            "%",
        )
        planned = ours + limits.work.get(phase.value, 0)
        watched = run.watched[phase.value]
        stage.on_cuda(
            f"{label}: peak in {phase.value}, distance from the {planned / GIB:.4g} GiB planned",
            abs(watched.peak / planned - 1),
            "%",
            most=CLOSE,
        )
        stage.on_cuda(f"{label}: peak in {phase.value}", watched.peak / GIB, "GiB")
        stage.on_cuda(f"{label}: all of the device in {phase.value}", watched.used / GIB, "GiB")


def reshard(stage: Stage, run: Colocated, label: str) -> None:
    """The last sync's work, and three more, against a copy."""
    nbytes = sum(p.nbytes for module in run.policy.engine.modules for p in module.parameters())
    found = []
    for _ in range(3):
        for phase in (Phase.GENERATE, Phase.UPDATE_POLICY):
            with run.phase(phase):
                pass
        run.sync()
        found.append(run.watched["sync_weights"].seconds)
    sync, copy = sorted(found)[1], copy_seconds(nbytes)
    stage.on_cuda(f"{label}: weight sync", sync, "s")
    stage.on_cuda(
        f"{label}: the sync's speed, of a copy within the device of {nbytes / GIB:.2f} GiB",
        copy / sync,
        "%",
        OF_A_COPY,
    )


def bandwidth(stage: Stage, run: Colocated, label: str) -> None:
    """Masters and moments of the policy, out and in, and a plain copy."""
    buffers = run.gpus._mover.buffers
    with run.phase(Phase.GENERATE):
        pass
    with run.phase(Phase.UPDATE_POLICY):
        mine = [buffers[name] for name in ("policy.masters", "policy.moments")]
        found = copy_rates(mine, run.ranks.device, repeat=1 if stage.small else 3)
    run.sync()
    for what, (ours, plain) in found.items():
        stage.on_cuda(f"{label}: {what}, plain page-locked copy", plain / 1e9, "GB/s")
        stage.on_cuda(f"{label}: {what}, ours", ours / 1e9, "GB/s")
        stage.on_cuda(f"{label}: {what}, of the plain copy", ours / plain, "%", OF_PINNED)


def main(arguments: list[str] | None = None) -> int:
    """All checks of the stage."""
    stage = Stage.of_arguments("colocation", arguments)
    stage.part("buffers move", 15, run_file, "test_moves.py")
    for name, layers in shapes_of(stage):
        if why := sglang_missing():
            stage.skip(f"{name}, {layers} layers: all models on one device", "", why)
        else:
            stage.part(f"{name}, {layers} layers", 50, colocation, name, layers)
    return stage.finish()


if __name__ == "__main__":
    sys.exit(main())
