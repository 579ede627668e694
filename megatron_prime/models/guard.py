"""What happens when a number is not finite: the batch is kept for replay, and the step stops.

The engines find it, on all ranks, before any weight changes, and name rank and tensor (NotFinite).
Here the rows that broke, all that their loss needs, and the weights at that moment are written to

    <run folder>/not_finite/<model>_<stage>_<n>/   batch.pt  config.toml  weights/

so that `python -m megatron_prime replay <that folder>` runs them again. The weights are those of
the model's own type, without the optimizer's state.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_prime.config import RunConfig
from megatron_prime.config_file import describe
from megatron_prime.errors import NotFinite
from megatron_prime.models.engine import Engine, Loss
from megatron_prime.models.training import StepResult, TrainableEngine
from megatron_prime.runtime.compat import megatron_calls, save_in_process
from megatron_prime.types import Metrics, RolloutBatch, ScoredBatch, TrainBatch

Batch = RolloutBatch | ScoredBatch | TrainBatch

KEPT = 3  # broken batches of one model that are saved; more of them tell nothing new


@dataclass(slots=True)
class Guard:
    """Runs one model's forwards and steps, and keeps what broke."""

    config: RunConfig
    model: str  # "policy", "prm" or "reference"
    skipped: int = 0  # optimizer steps that were left out since the start of the process

    def logprobs(self, engine: Engine, batch: RolloutBatch) -> Tensor:
        """`engine.logprobs`; raises NotFinite with the saved batch's path."""
        try:
            return engine.logprobs(batch.sequences)
        except NotFinite as error:  # only to save what broke
            raise NotFinite(self._told(error, engine, "score", batch)) from error

    def train_step(
        self, engine: TrainableEngine, batch: ScoredBatch | TrainBatch, rows: Tensor, loss: Loss
    ) -> StepResult | None:
        """`engine.train_step` on `rows`; None when it broke and `debug.on_not_finite` skips it.

        Raises NotFinite with the saved batch's path otherwise.
        """
        try:
            return engine.train_step(rollouts_of(batch).sequences, rows.tolist(), loss)
        except NotFinite as error:  # to save what broke; no weight has changed, so a run may go on
            told = self._told(error, engine, "update", batch.select(rows))
            if self.config.debug.on_not_finite == "stop":
                raise NotFinite(told) from error
            self.skipped += 1
            if dist.get_rank() == 0:
                print(f"{self.model}: skipped a mini-batch: {told}", file=sys.stderr, flush=True)
            return None

    def figures(self) -> Metrics:
        """How many steps were skipped so far, if skipping is on."""
        if self.config.debug.on_not_finite == "stop":
            return {}
        return {f"{self.model}/not_finite_steps": self.skipped}

    def _told(self, error: NotFinite, engine: Engine, stage: str, batch: Batch) -> str:
        parent = self.config.run.folder / "not_finite"
        saved = [sorted(parent.glob(f"{self.model}_{stage}_*"))]
        dist.broadcast_object_list(saved, src=0)
        if len(saved[0]) >= KEPT:
            return f"{error}\n(not saved: {parent} holds {KEPT} of this kind)"
        folder = parent / f"{self.model}_{stage}_{len(saved[0])}"
        save(folder, self.config, self.model, engine, batch)
        return f"{error}\nrun it again with: python -m megatron_prime replay {folder}"


def rollouts_of(batch: Batch) -> RolloutBatch:
    """The rollouts inside any batch."""
    if isinstance(batch, TrainBatch):
        return batch.scored.rollouts
    return batch.rollouts if isinstance(batch, ScoredBatch) else batch


def save(folder: Path, config: RunConfig, model: str, engine: Engine, batch: Batch) -> None:
    """Write what `replay` needs; collective."""
    if dist.get_rank() == 0:
        (folder / "weights").mkdir(parents=True)
        torch.save({"model": model, "batch": batch}, folder / "batch.pt")
        (folder / "config.toml").write_text(describe(config) + "\n")
    dist.barrier()
    save_in_process()
    with megatron_calls():
        dist_checkpointing.save(engine.sharded_weights(), str(folder / "weights"))


def load_weights(engine: Engine, folder: Path) -> None:
    """The weights that `save` wrote, in any layout; collective."""
    with megatron_calls():
        wanted = engine.sharded_weights()
        engine.load_weights(dist_checkpointing.load(wanted, str(folder / "weights")))


def load_batch(folder: Path) -> tuple[str, Batch]:
    """The model's name and the rows that broke."""
    saved = torch.load(folder / "batch.pt", weights_only=False)
    return saved["model"], saved["batch"]


class Tracer:
    """Notes which module's output was first not finite, in the order of computation."""

    def __init__(self, engine: Engine) -> None:
        self.found: list[str] = []
        for chunk in engine.modules:
            for name, module in chunk.named_modules():
                module.register_forward_hook(partial(self._look, name or "the whole stage"))

    def _look(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(x.isfinite().all() for x in tensors if isinstance(x, Tensor)):
            self.found.append(f"output of {name}")
