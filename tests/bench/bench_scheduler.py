"""What phases cost: switching with nothing to move, bytes moved, and how fast they move.

    python tests/bench/bench_scheduler.py [--repeat N] [--hidden H --layers L --vocabulary V]

Policy, PRM and reference of a random model in bf16 on one rank, and a step without generation:
score, update the PRM, update the policy. With everything resident, the time of a step's phase
switches is set against that of its work. With `memory.offload = "always"` the bytes that a step
moves are set against the least that its table allows, which is counted here from the sizes of the
tensors alone: states go out once per update of theirs, and come for each phase that begins without
them. On a GPU, masters and moments leaving and coming are set against one plain page-locked copy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from session import one_rank, ragged_rows, run_config
from table import row, seconds
from update import larger_model

from megatron_prime.config import RunConfig
from megatron_prime.planner.residency import NEEDED, RESIDENT
from megatron_prime.protocols import Phase
from megatron_prime.types import RolloutBatch, ScoredBatch, TrainBatch

WARM_UP = 2
SWITCHES = 200  # rounds of empty phases
LARGEST_COPY = 4 * 2**30
STEP = (
    Phase.GENERATE,
    Phase.SCORE,
    Phase.UPDATE_PRM,
    Phase.UPDATE_POLICY,
    Phase.SYNC_WEIGHTS,
    Phase.CHECKPOINT,
)


def main(arguments: list[str] | None = None) -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    known = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = larger_model(folder, known.hidden, known.layers, known.vocabulary)
        config = run_config(folder, model)
        half = {name: {"dtype": "bf16"} for name in ("policy", "prm", "reference")}
        tables = {"precision": half, "prm": config.policy.model_dump(include={"mini_batch_size"})}
        config = RunConfig.model_validate(
            config.model_dump(exclude={"advantage"}, exclude_unset=True) | tables
        )
        with one_rank(config):
            models = Models(config, known.vocabulary)
            overhead(models, known.repeat)
            moved(models, known.repeat)
            if torch.cuda.is_available():
                bandwidth(models, known.repeat)


class Models:
    """The three of them, with rows to work on."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        from megatron_prime.models.factory import policy_of, prm_of, reference_of

        self.policy, self.prm = policy_of(config), prm_of(config)
        self.reference = reference_of(config)
        self.rows = ragged_rows(vocabulary)
        self.device = self.policy.engine.grid.device
        size = sum(p.numel() for m in self.policy.engine.modules for p in m.parameters())
        self.size = f"{size / 1e6:.1f} M parameters"

    def buffers(self) -> dict[str, Any]:
        """All that the scheduler may move, by name."""
        from megatron_prime.models.buffers import buffers_of

        owners = {"policy": self.policy, "prm": self.prm, "reference": self.reference}
        found = [b for name, owner in owners.items() for b in buffers_of(name, owner.engine)]
        return {buffer.name: buffer for buffer in found}

    def scheduler(self, table: Any) -> Any:
        """One with this table, without a limit."""
        from megatron_prime.runtime.ledger import Limits
        from megatron_prime.runtime.scheduler import PhaseScheduler

        gpus = PhaseScheduler(Limits(table), self.device)
        gpus.add(self.buffers().values())
        return gpus

    def step(self, gpus: Any) -> dict[Phase, float]:
        """All phases of a step with their work; seconds of the work of each."""
        found: dict[Phase, float] = {}

        @contextmanager
        def timed(phase: Phase) -> Iterator[None]:
            with gpus.phase(phase):
                started = time.perf_counter()
                yield
                found[phase] = time.perf_counter() - started

        rows: RolloutBatch = self.rows
        with timed(Phase.GENERATE):
            pass
        with timed(Phase.SCORE):
            ref, old = self.reference.logprobs(rows), self.policy.old_logprobs(rows)
        scored = ScoredBatch(rows, old, ref)
        with timed(Phase.UPDATE_PRM):
            self.prm.update(scored)
        advantages = (ref * 0 + rows.outcome_rewards[:, None] - 0.5) * rows.response_mask
        with timed(Phase.UPDATE_POLICY):
            self.policy.update(TrainBatch(scored, None, advantages))
        for phase in (Phase.SYNC_WEIGHTS, Phase.CHECKPOINT):
            with timed(phase):
                pass
        return found


def overhead(models: Models, repeat: int) -> None:
    """Everything resident: entering and leaving phases against the work inside."""
    gpus = models.scheduler(RESIDENT)
    work = [sum(models.step(gpus).values()) for _ in range(WARM_UP + repeat)][WARM_UP:]
    turns = []
    for _ in range(SWITCHES):
        started = time.perf_counter()
        for phase in STEP:
            with gpus.phase(phase):
                pass
        turns.append(time.perf_counter() - started)
    switches, step = median(turns), median(work)
    row(
        f"phase switches of a step, nothing to move, {models.size}",
        seconds(switches),
        seconds(step),
        f"{switches / step:.3%} of the step",
        "< 1 %",
        f"{len(STEP)} phases, ledger included; the step without generation",
    )


def moved(models: Models, repeat: int) -> None:
    """Everything that is not needed leaves: bytes against the least that is possible."""
    gpus = models.scheduler(NEEDED)
    for _ in range(WARM_UP):
        models.step(gpus)
    gpus.take_memory()
    started = time.perf_counter()
    for _ in range(repeat):
        models.step(gpus)
    elapsed = (time.perf_counter() - started) / repeat
    figures = gpus.take_memory()
    found = sum(figures[f"memory/moved_to_{where}_gib"] for where in ("host", "device"))
    least = repeat * least_bytes(models) / 2**30
    row(
        f"bytes moved in a step, {models.size}, everything leaves",
        f"{found / repeat * 2**10:.1f} MiB",
        f"{least / repeat * 2**10:.1f} MiB",
        f"{found / least:.3f} ×",
        "1.0 ×",
        f"theirs: what the table of phases implies; the step takes {seconds(elapsed)}",
    )


def least_bytes(models: Models) -> int:
    """Of a step, from parameters' sizes: fp32 masters 4, two moments 8, weights 2 bytes each.

    Policy and PRM: states out once and in once for the update; masters in again for each phase
    that wants only weights: score and checkpoint of the policy (the sync follows the update), the
    checkpoint of the PRM. The reference comes once, for the score, and leaves without a copy.
    """
    values = sum(p.numel() for m in models.policy.engine.modules for p in m.parameters())
    once = 2 * (4 + 8) * values
    return 2 * once + 4 * values * (1 + 1) + 2 * values


def bandwidth(models: Models, repeat: int) -> None:
    """States leaving and coming, one after the other, against plain copies."""
    mine = [models.buffers()[name] for name in ("policy.masters", "policy.moments")]
    for what, (ours, plain) in copy_rates(mine, models.device, repeat).items():
        row(
            f"masters and moments {what}, {models.size}",
            f"{ours / 1e9:.1f} GB/s",
            f"{plain / 1e9:.1f} GB/s",
            f"{ours / plain:.2f} ×",
            "≥ 0.9 ×",
            "theirs: one plain copy from and to page-locked memory",
        )


def copy_rates(
    buffers: Sequence[Any], device: torch.device, repeat: int
) -> dict[str, tuple[float, float]]:
    """Bytes per second that `buffers`, which lie on the device, leave and come with, and those of a
    plain copy of as many bytes, or of 4 GiB if they are more: enough for a rate."""
    from megatron_prime.runtime.memory import host_bytes
    from megatron_prime.runtime.mover import Mover

    mover = Mover(None, device)
    for buffer in buffers:
        mover.add(buffer)
    names = frozenset(buffer.name for buffer in buffers)
    nbytes = mover.on_device()
    mover.written(names)
    out = timed(repeat, lambda: mover.switch(frozenset()), lambda: come(mover, names))
    mover.switch(frozenset())
    back = timed(repeat, lambda: mover.switch(names), lambda: leave(mover, names))
    mover.switch(names)
    few = min(nbytes, LARGEST_COPY)
    here = torch.empty(few, dtype=torch.uint8, device=device)
    host = host_bytes(few, device)
    plain_out = timed(repeat, lambda: host.copy_(here, non_blocking=True))
    plain_back = timed(repeat, lambda: here.copy_(host, non_blocking=True))
    return {
        "leaving": (nbytes / out, few / plain_out),
        "coming": (nbytes / back, few / plain_back),
    }


def come(mover: Any, names: frozenset[str]) -> None:
    """So that they leave again, with a copy as after an update."""
    mover.switch(names)
    mover.written(names)


def leave(mover: Any, names: frozenset[str]) -> None:
    """So that they come again."""
    come(mover, names)
    mover.switch(frozenset())


def timed(
    repeat: int, work: Callable[[], object], undo: Callable[[], object] = lambda: None
) -> float:
    """Median seconds of `work`, the GPU's included; `undo` between two."""
    found = []
    for _ in range(WARM_UP + repeat):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
        undo()
    return median(found[WARM_UP:])


if __name__ == "__main__":
    main()
