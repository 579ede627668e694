"""A plan as a picture: the bytes of each phase, and under its name the predicted seconds."""

from __future__ import annotations

from pathlib import Path

from megatron_prime.config import RunConfig
from megatron_prime.planner.memory import MemoryPlan
from megatron_prime.planner.residency import ALL, CHECKPOINT, EVALUATE, Table
from megatron_prime.planner.seconds import StepSeconds
from megatron_prime.report.memory_picture import PhaseBar, draw_memory

_LIMITS = {  # what a phase mostly waits for
    "compute": "computes",
    "hbm": "reads memory",
    "nvlink": "NVLink",
    "network": "network",
    "pcie": "PCIe",
    "pipeline": "pipeline",
    "latency": "latency",
    "-": "nothing to do",
}


def draw(
    config: RunConfig, plan: MemoryPlan, table: Table, step: StepSeconds | None, png: Path
) -> None:
    """The phases of every step; evaluating is generating, checkpoints are written now and then."""
    sizes = config.parallel
    bars = []
    for phase in plan.phases:
        if phase.phase in (EVALUATE, CHECKPOINT):
            continue
        timed = step.of(phase.phase) if step else None
        caption = f"{timed.seconds:.2f} s\n{_LIMITS[timed.limit]}" if timed else ""
        bars.append(PhaseBar(phase.phase, phase.resident, phase.working, caption))
    title = (
        f"{config.model.hf.name} on {plan.world_size} ranks: TP {sizes.tp} × PP {sizes.pp} × "
        f"CP {sizes.cp} × DP {plan.world_size // sizes.replica}"
    )
    resident = all(row == ALL for row in table.values())
    subtitle = "everything resident" if resident else "offloaded between phases"
    if step:
        subtitle += f"; seconds are predictions, {step.seconds:.0f} a step"
    machine = plan.machine
    draw_memory(bars, machine.device_bytes, machine.reserve_bytes, png, title, subtitle)
