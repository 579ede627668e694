"""`python -m megatron_prime replay FOLDER`: run a batch that was not finite again, and look closer.

Weights, rows and configuration come from FOLDER (`models/guard.py` wrote it), and
`--section.key=value` changes the configuration: `--precision.policy.dtype=fp32` tells whether the
number format is at fault, another `[megatron]` layout whether a rank is. fp16 starts at the loss
scale at which the batch broke. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_prime import build
from megatron_prime.config import RunConfig
from megatron_prime.errors import NotFinite
from megatron_prime.models.critic import MegatronCritic
from megatron_prime.models.engine import Loss, culprits
from megatron_prime.models.factory import (
    critic_of,
    policy_of,
    prm_of,
    reference_of,
    sft_engine,
)
from megatron_prime.models.guard import Batch, Kept, Tracer, load_batch, load_weights, rollouts_of
from megatron_prime.models.mini_batch import MiniBatch, learning
from megatron_prime.models.policy import MegatronPolicy
from megatron_prime.models.prm import FrozenPrm, MegatronPrm
from megatron_prime.models.reference import MegatronReference
from megatron_prime.models.training import TrainableEngine
from megatron_prime.runtime.launch import Launch
from megatron_prime.sft import FineTuning, loss_of
from megatron_prime.types import ScoredBatch, TrainBatch
from megatron_prime.value_batch import ValueBatch

Model = MegatronPolicy | MegatronPrm | FrozenPrm | MegatronReference | MegatronCritic | FineTuning


def replay(config: RunConfig, launch: Launch, folder: Path) -> None:
    """Print loss, gradient norm and log-probs, or raise NotFinite with all that is known."""
    kept = load_batch(folder)
    make: dict[str, Callable[[RunConfig], Model]] = {
        "policy": policy_of,
        "prm": prm_of,
        "reference": reference_of,
        "critic": critic_of,
        "sft": lambda config: FineTuning(sft_engine(config)),
    }
    with build.training_session(config, launch, "replay") as ranks, launch.steps(agree=None):
        model = make[kept.model](config)
        load_weights(model.engine, folder)
        tracer = Tracer(model.engine)
        try:
            told = run_again(model, kept)
        except NotFinite as error:  # it happened again: say where it began
            first = culprits(tracer.found) or "none: the loss or the backward pass broke it"
            raise NotFinite(f"{error}\nfirst outputs that are not finite:\n{first}") from error
        if ranks.rank == 0:
            print(f"{kept.model}: all is finite this time: {told}")


def run_again(model: Model, kept: Kept) -> str:
    """The forward, or the forward and backward, that broke; what it gave.

    Raises NotFinite if it broke again, or fp16 gradients overflowed.
    """
    rollouts, engine = rollouts_of(kept.batch), model.engine
    loss, gives = _loss(model, kept.batch), engine.gives
    if loss is None:
        return _shown(engine.logprobs(rollouts.sequences), rollouts.response_mask, gives)
    assert isinstance(engine, TrainableEngine), "only trained models have a loss"
    if kept.loss_scale is not None and engine.loss_scale is not None:
        engine.set_loss_scale(kept.loss_scale)
    step = engine.train_step(rollouts.sequences, range(len(rollouts.sequences)), loss)
    if not step.updated:
        raise NotFinite(
            f"gradients overflow at the loss scale {step.loss_scale:g}, which may still fall: a "
            "run would skip this step and go on with a smaller one"
        )
    outputs = _shown(step.logprobs, rollouts.response_mask, gives)
    return f"loss {step.loss:.6g}, gradient norm {step.grad_norm:.6g}, {outputs}"


def _loss(model: Model, batch: Batch) -> Loss | None:
    """The update's loss on the whole batch; None if it broke while it was scored."""
    rollouts = rollouts_of(batch)
    rows = torch.arange(len(rollouts.sequences))
    if isinstance(model, FineTuning):
        return loss_of(rollouts.response_mask)
    if isinstance(model, MegatronPolicy) and isinstance(batch, TrainBatch):
        return model.loss_of(batch, MiniBatch.of(rollouts, learning(rollouts, rows)))
    if isinstance(model, MegatronPrm) and isinstance(batch, ScoredBatch):
        return model.loss_of(batch, rows)
    if isinstance(model, MegatronCritic) and isinstance(batch, ValueBatch):
        return model.loss_of(batch, MiniBatch.of(rollouts, learning(rollouts, rows)))
    return None


def _shown(outputs: torch.Tensor, mask: torch.Tensor, gives: str) -> str:
    found = outputs[mask[:, : outputs.shape[1]]]
    return f"{len(found)} {gives} from {found.min():.4g} to {found.max():.4g}"
