"""Frozen models: log-probs from Hugging Face files or a run's own checkpoint, a PRM's rewards.

A trained PRM and its reference, side by side, reward the tokens of any response: that is all of
`score`, and of the choice among several answers in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.config import ModelName, RunConfig
from megatron_prime.errors import NotFinite
from megatron_prime.models.architecture import build_model
from megatron_prime.models.engine import Engine
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.types import TokenSequence
from megatron_prime.weights.directories import hf_of as of_run
from megatron_prime.weights.directories import kind_of, weights_in
from megatron_prime.weights.load import load_hf
from megatron_prime.weights.shape import shape_of


def frozen(config: RunConfig, name: ModelName, weights: Path) -> Engine:
    """The model called `name` with the weights in the directory `weights`, at temperature 1.

    A checkpoint of a run is read by any layout; its optimizer is not looked at. Its shape is that
    of the Hugging Face directory which the configuration names for the model.
    """
    shape = shape_of(config, name)
    chunks = build_model(shape, config.precision.of(name), config.megatron)
    engine = Engine(chunks, shape, config.prm.micro_batch_tokens, temperature=1.0)
    if kind_of(weights) == "huggingface":
        load_hf(chunks, weights, shape)
    else:
        with megatron_calls():
            folder = weights_in(weights, name).folder
            state = dist_checkpointing.load(engine.sharded_weights(), str(folder))
            engine.load_weights(state)
    for module in engine.modules:
        module.requires_grad_(False)
    return engine


def logprobs_of(engine: Engine, sequences: Sequence[TokenSequence]) -> Tensor:
    """Log-probs of all response tokens: float32 [N, T], 0 on padding, for any number of rows.

    Data-parallel ranks share rows evenly, so the shortest one is repeated until they can.
    """
    even = engine.grid.dp_size * engine.grid.multiple
    shortest = min(sequences, key=lambda sequence: len(sequence.token_ids))
    fill = [shortest] * (-len(sequences) % even)
    return engine.logprobs([*sequences, *fill])[: len(sequences)]


@dataclass(frozen=True, slots=True)
class PrmScorer:
    """A trained PRM with its reference."""

    prm: Engine
    reference: Engine
    beta: float

    @classmethod
    def load(cls, config: RunConfig, prm: Path) -> Self:
        """The PRM in the directory `prm`; `config` is one of `scoring_config`; collective."""
        reference = frozen(config, "reference", config.model.hf)
        return cls(frozen(config, "prm", prm), reference, config.prm.beta)

    def rewards(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Token rewards float64 [N, T], 0 on padding, and the mask of tokens; collective."""
        prm, ref = (logprobs_of(engine, sequences) for engine in (self.prm, self.reference))
        lengths = torch.tensor([sequence.response_length for sequence in sequences])
        mask = torch.arange(prm.shape[1]) < lengths[:, None]
        return token_rewards(prm, ref[:, : prm.shape[1]], mask, self.beta), mask


def token_rewards(
    prm_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """`implicit_rewards` of responses [N, T], for those who write numbers down: float64.

    Raises NotFinite, on every rank that asks, for rewards that are not finite: they could choose
    nothing, and JSON has no word for them.
    """
    rewards = implicit_rewards(prm_logprobs.double(), ref_logprobs.double(), response_mask, beta)
    broken = ~rewards.isfinite().all(dim=1)  # padding is 0
    if bool(broken.any()):
        raise NotFinite(
            f"found token rewards that are not finite in {int(broken.sum())} of {len(broken)} "
            f"responses, the first in number {int(broken.int().argmax())}; wanted finite log-probs "
            "of PRM and reference: look at their weights, and at precision.prm and "
            "precision.reference. What is on disk stays as it is"
        )
    return rewards


def scoring_config(config: RunConfig, prm: Path, reference: Path | None) -> RunConfig:
    """The configuration whose `model.hf` is the reference's and whose `prm.hf` has the shape of the
    PRM in `prm`; without `reference` it is that of the run which made `prm`."""
    is_run = (prm / "run.json").exists()
    if reference is None:
        reference = of_run(prm / "run.json", "reference")
    changed = {
        "model": config.model.model_copy(update={"hf": reference}),
        "prm": config.prm.model_copy(
            update={"hf": of_run(prm / "run.json", "prm") if is_run else prm}
        ),
    }
    return config.model_copy(update=changed)
