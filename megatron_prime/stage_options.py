"""Tables of the stages around reinforcement learning.

`config.py` puts them beside the others and is where others import from. No torch, no Megatron.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_prime.options import (
    BatchSection,
    FilePath,
    Positive,
    PositiveFloat,
    Section,
)


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
