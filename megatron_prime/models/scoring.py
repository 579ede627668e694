"""A frozen model that only gives log-probs: from Hugging Face files, or a run's own checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_prime.config import ModelName, RunConfig
from megatron_prime.models.architecture import build_model
from megatron_prime.models.engine import Engine
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.types import TokenSequence
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
