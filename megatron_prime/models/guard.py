"""What happens when a number is not finite: the batch is kept for replay, and the step stops.

The engines find it, on all ranks, before any weight changes, and name rank and tensor (NotFinite).
Here the rows that broke, all that their loss needs, and the weights at that moment are written to

    <run folder>/not_finite/<model>_<stage>_<n>/   batch.pt  config.toml  weights/

so that `python -m megatron_prime replay <that folder>` runs them again, in any layout. The weights
are a Hugging Face checkpoint in the model's own type: no optimizer, no history of FP8's scales.

Such a folder is what people send with a report, so reading it must not run what it brings: weights
are safetensors and batch.pt holds tensors, numbers, strings and lists, read by the loader that
takes nothing else. (Megatron's checkpoints hold pickles.)
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prime.config import RunConfig
from megatron_prime.config_file import describe
from megatron_prime.errors import NotFinite, RunError
from megatron_prime.models.engine import Engine, Loss
from megatron_prime.models.training import StepResult, TrainableEngine
from megatron_prime.types import (
    Metrics,
    OldLogprobs,
    RolloutBatch,
    ScoredBatch,
    TokenSequence,
    TrainBatch,
)
from megatron_prime.value_batch import ValueBatch
from megatron_prime.weights.export import export_hf
from megatron_prime.weights.load import load_hf

Batch = RolloutBatch | ScoredBatch | TrainBatch | ValueBatch

KEPT = 3  # broken batches of one model that are saved; more of them tell nothing new


@dataclass(slots=True)
class Guard:
    """Runs one model's forwards and steps, and keeps what broke."""

    config: RunConfig
    model: str  # "policy", "prm", "reference", "critic" or "sft"
    skipped: int = 0  # mini-batches of the present update that were left out

    def logprobs(self, engine: Engine, batch: RolloutBatch) -> Tensor:
        """`engine.logprobs`; raises NotFinite with the saved batch's path."""
        try:
            return engine.logprobs(batch.sequences)
        except NotFinite as error:  # only to save what broke
            raise NotFinite(self._told(error, engine, "score", batch)) from error

    def train_step(
        self, engine: TrainableEngine, batch: Batch, rows: Tensor, loss: Loss
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

    def end_update(self, steps: int) -> Metrics:
        """How many mini-batches the update skipped, beside `steps` that it took.

        Nothing if skipping is off; NotFinite if all were skipped, or a run could do so for ever.
        """
        if self.config.debug.on_not_finite == "stop":
            return {}
        skipped, self.skipped = self.skipped, 0
        if steps == 0:
            raise NotFinite(
                f"{self.model}: all {skipped} mini-batches of an update were skipped, so it learns "
                f"nothing any more; look at one with python -m megatron_prime replay (the folders "
                f"in {self.config.run.folder / 'not_finite'}), or start again with a lower lr"
            )
        return {f"{self.model}/not_finite_steps": skipped}

    def _told(self, error: NotFinite, engine: Engine, stage: str, batch: Batch) -> str:
        parent = self.config.run.folder / "not_finite"
        names = [parent / f"{self.model}_{stage}_{number}" for number in range(KEPT)]
        free = [next((path for path in names if not path.exists()), None)]
        dist.broadcast_object_list(free, src=0)
        if (folder := free[0]) is None:
            return f"{error}\n(not saved: {parent} holds {KEPT} of this kind)"
        save(folder, self.config, self.model, engine, batch)
        return f"{error}\nrun it again with: python -m megatron_prime replay {folder}"


def rollouts_of(batch: Batch) -> RolloutBatch:
    """The rollouts inside any batch."""
    if isinstance(batch, TrainBatch):
        return batch.scored.rollouts
    return batch if isinstance(batch, RolloutBatch) else batch.rollouts


@dataclass(frozen=True, slots=True)
class Kept:
    """What broke."""

    model: str
    batch: Batch
    loss_scale: float | None  # of a model whose loss scale adapts


def save(folder: Path, config: RunConfig, model: str, engine: Engine, batch: Batch) -> None:
    """Write what `replay` needs; collective."""
    scale = engine.loss_scale if isinstance(engine, TrainableEngine) else None
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        saved = {"model": model, "loss_scale": scale, "batch": _plain(batch)}
        torch.save(saved, folder / "batch.pt")
        (folder / "config.toml").write_text(describe(config) + "\n")
    source = config.own_hf(model) or config.model.hf
    export_hf(engine.modules, engine.shape, source, folder / "weights")


def load_weights(engine: Engine, folder: Path) -> None:
    """The weights that `save` wrote, in any layout."""
    load_hf(engine.modules, folder / "weights", engine.shape)


def load_batch(folder: Path) -> Kept:
    """The rows that broke; RunError if the file is anything else."""
    path = folder / "batch.pt"
    try:
        saved = torch.load(path, weights_only=True)
        return Kept(saved["model"], _rebuilt(saved["batch"]), saved["loss_scale"])
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise RunError(
            f"{path} is no batch that a run kept ({cause}); wanted a folder of a run's not_finite/"
        ) from error


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch as tensors, numbers and lists."""
    if isinstance(batch, TrainBatch):
        rest = {"process_rewards": batch.process_rewards, "advantages": batch.advantages}
        return {"scored": _plain(batch.scored), **rest}
    if isinstance(batch, ValueBatch):
        rest = {"values": batch.values, "returns": batch.returns, "to_come": batch.to_come}
        return {"rollouts": _plain(batch.rollouts), **rest}
    if isinstance(batch, ScoredBatch):
        return {
            "rollouts": _plain(batch.rollouts),
            "old_logprobs": {
                "known": batch.old_logprobs.known,
                "logprobs": batch.old_logprobs.logprobs,
            },
            "ref_logprobs": batch.ref_logprobs,
        }
    return {
        "sequences": [[list(s.token_ids), s.prompt_length] for s in batch.sequences],
        "group_size": batch.group_size,
        "response_mask": batch.response_mask,
        "outcome_rewards": batch.outcome_rewards,
        "rollout_logprobs": batch.rollout_logprobs,
        "learns": batch.learns,
    }


def _rebuilt(saved: dict[str, Any]) -> Any:
    """The batch that `_plain` took apart."""
    if "scored" in saved:
        return TrainBatch(**{**saved, "scored": _rebuilt(saved["scored"])})
    if "returns" in saved:
        return ValueBatch(**{**saved, "rollouts": _rebuilt(saved["rollouts"])})
    if "rollouts" in saved:
        old = OldLogprobs(**saved["old_logprobs"])
        rollouts = _rebuilt(saved["rollouts"])
        return ScoredBatch(**{**saved, "rollouts": rollouts, "old_logprobs": old})
    sequences = tuple(TokenSequence(tuple(ids), prompt) for ids, prompt in saved["sequences"])
    return RolloutBatch(**{**saved, "sequences": sequences})


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
