"""What an update and a scoring pass of one model cost: seconds, peak memory, model FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from stage_colocated import one_session
from stage_measure import peak_of, seconds_of, utilisation
from stage_report import Stage
from stage_sizes import MODELS, config_of, dtype_of, model_folder, rows_of

from megatron_prime.config import RunConfig
from megatron_prime.types import OldLogprobs, RolloutBatch, ScoredBatch, TrainBatch
from megatron_prime.weights.shape import ModelShape

# What Megatron can fuse and does not by itself; apex or Transformer Engine bring the kernels.
FUSED = {"bias_activation_fusion": True, "apply_rope_fusion": True}


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model on one batch."""

    tokens: int
    update_s: float
    scoring_s: float
    update_peak: int  # bytes, states included
    update_mfu: float
    scoring_mfu: float

    @property
    def update_rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.update_s


def batch_for(stage: Stage, model: Any) -> RolloutBatch:
    """Rows that fill packs: about 60 000 tokens on a GPU, half of that in a short run."""
    shape = ModelShape.from_hf(model)
    if stage.small:
        return rows_of(shape, 8, 8, 24, 4)
    return rows_of(shape, 16 if stage.short else 32, 128, 1920, 4)


def config_for(
    stage: Stage, name: str, layers: int, precision: dict[str, Any], megatron: dict[str, Any]
) -> RunConfig:
    """The policy alone: no engine is started."""
    model = model_folder(stage, name, layers)
    formats = {one: {"dtype": dtype_of(stage)} for one in MODELS} | {
        "policy": {"dtype": dtype_of(stage), **precision}
    }
    return config_of(
        stage,
        model,
        f"update_{name}",
        precision=formats,
        megatron=megatron if stage.on_gpu else {},
        advantage={"process_weight": 0.0},
        policy={"mini_batch_size": 1024, "micro_batch_tokens": 64 if stage.small else 16384},
    )


def figures(stage: Stage, config: RunConfig) -> Figures:
    """Of the policy of `config`; two updates warm up, for the first one makes the moments."""
    batch = batch_for(stage, config.model.hf)
    with one_session(config):
        from megatron_prime.models.factory import policy_of

        policy = policy_of(config)
        shape = policy.engine.shape
        given = train_batch(batch)
        for _ in range(2):
            policy.update(given)
        peak = peak_of(lambda: policy.update(given))
        update = seconds_of(lambda: policy.update(given), warm_up=0)
        scoring = seconds_of(lambda: policy.logprobs(batch))
    tokens = sum(len(sequence.token_ids) for sequence in batch.sequences)
    return Figures(
        tokens,
        update,
        scoring,
        peak,
        utilisation(shape, batch, 3, update),
        utilisation(shape, batch, 1, scoring),
    )


def train_batch(batch: RolloutBatch) -> TrainBatch:
    """Advantages of both signs, nothing scored before."""
    noise = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(1))
    scored = ScoredBatch(batch, OldLogprobs.none(batch), None)
    return TrainBatch(scored, None, noise * batch.response_mask)
