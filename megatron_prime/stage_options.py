"""Tables of the stages around reinforcement learning, and what all that trains has in common.

`config.py` puts them beside the others and is where others import from. No torch, no Megatron.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_prime.options import (
    Beta,
    FilePath,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class OptimizerSection(Section):
    """AdamW with fp32 master weights, warm-up, then constant or cosine."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad: PositiveFloat = 1.0
    """Largest global gradient norm."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up; `cosine` ends at 0 with the last step."""


class BatchSection(OptimizerSection):
    """How one step's rollouts are cut up for an update."""

    mini_batch_size: Positive = 256
    """Rollouts per optimizer step."""
    micro_batch_tokens: Positive = 8192
    """Tokens that one rank puts through the model at once; what fills a pack up to a multiple that
    FP8, sequence parallelism or a pipeline wants comes on top."""


class SftSection(BatchSection):
    """Supervised fine-tuning (`python -m megatron_prime sft`)."""

    data: FilePath | None = None
    """Chat jsonl ({"messages": [...]}); the loss is on assistant tokens only."""
    held_out: FilePath | None = None
    """Conversations that are not learnt; their loss is logged before the first step, every
    `evaluate.every` steps and after the last."""
    output: FilePath | None = None
    """Hugging Face checkpoint directory to write; none writes `hf` in the run folder."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights of `model.hf`, or from random ones of its shape."""
    steps: Positive = 1000
    """Optimizer steps."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What follows the warm-up; `cosine` ends at 0 with the last step."""
    mini_batch_size: Positive = 96
    """Conversations per optimizer step."""
    max_length: Positive = 4096
    """Longer conversations are counted and dropped."""


class TrainPrmSection(Section):
    """The PRM of `[prm]` trained on labelled responses (`python -m megatron_prime train_prm`)."""

    data: FilePath | None = None
    """Labelled responses: a .jsonl or .parquet file, or a run's `rollouts/` folder; the rows are
    described in docs/stages.md."""
    held_out: FilePath | None = None
    """The same of prompts to be judged by and not learnt; not set: a share of `data`."""
    held_out_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the prompts of `data` that is held out, with all their responses and at least one if
    it is not 0; of no meaning with `held_out`."""
    reference: Literal["once", "loaded"] = "once"
    """How the frozen reference, `model.hf`, is used: `once`, for log-probs of all data, which are
    kept in `reference_logprobs.pt` of the run folder, and then dropped; or `loaded`, for those of
    each batch, beside the PRM: as much memory as its weights, and a forward a step."""
    steps: Positive = 1000
    """Optimizer steps, each on `prm.mini_batch_size` responses."""
    max_length: Positive = 4096
    """Prompt and response together; longer responses are counted and dropped."""
    output: FilePath | None = None
    """Hugging Face checkpoint directory to write; none writes `hf` in the run folder."""


class ScoreSection(Section):
    """Token and step rewards of given texts (`python -m megatron_prime score`)."""

    input: FilePath | None = None
    """Texts to score (.jsonl or .parquet): a prompt and responses, or messages that end with the
    assistant's."""
    output: FilePath | None = None
    """File of scores to write, a JSON line for each response; none writes
    `scores/scores.jsonl` in the run folder."""
    prm: FilePath | None = None
    """The trained PRM: a Hugging Face checkpoint, or a run's `checkpoints/step_…`."""
    reference: FilePath | None = None
    """Hugging Face checkpoint of the reference in its log-ratio; not set: as for
    `evaluate.reference`, the `model.hf` of the run that `prm` is a checkpoint of."""
    chunk: Positive = 64
    """Responses that are scored and written together: what a kill may lose."""
