"""From a checked configuration to the models at their start; process groups must stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_prime.config import BatchSection, ModelName, RunConfig
from megatron_prime.models.architecture import ModelShape, build_model
from megatron_prime.models.critic import MegatronCritic
from megatron_prime.models.engine import Engine
from megatron_prime.models.guard import Guard
from megatron_prime.models.policy import MegatronPolicy
from megatron_prime.models.prm import FrozenPrm, MegatronPrm
from megatron_prime.models.reference import MegatronReference
from megatron_prime.models.training import TrainableEngine
from megatron_prime.weights.directories import weights_in
from megatron_prime.weights.load import load, load_hf
from megatron_prime.weights.shape import shape_of
from megatron_prime.weights.source import MegatronWeights


def policy_of(config: RunConfig) -> MegatronPolicy:
    """The policy, at its start."""
    engine = trained(config, "policy", config.policy, config.rollout.temperature, config.run.steps)
    return MegatronPolicy(engine, config.policy, config.run.seed, Guard(config, "policy"))


def prm_of(config: RunConfig) -> MegatronPrm | FrozenPrm:
    """The PRM, at its start."""
    if "prm" in config.frozen:
        chunks, shape = loaded(config, "prm")
        frozen = Engine(chunks, shape, config.prm.micro_batch_tokens, temperature=1.0)
        return FrozenPrm(frozen, Guard(config, "prm"))
    return trained_prm(config, config.run.steps)


def trained_prm(config: RunConfig, steps: int) -> MegatronPrm:
    """The PRM with its optimizer, at the start of `steps` updates."""
    engine = trained(config, "prm", config.prm, 1.0, steps)
    return MegatronPrm(engine, config.prm, Guard(config, "prm"))


def reference_of(config: RunConfig, batches: BatchSection | None = None) -> MegatronReference:
    """The reference; `batches` says how they are cut, if not as those of a run."""
    chunks, shape = loaded(config, "reference")
    batches = batches or config.batches_of("reference")
    engine = Engine(chunks, shape, batches.micro_batch_tokens, temperature=1.0)
    return MegatronReference(engine, Guard(config, "reference"))


def critic_of(config: RunConfig) -> MegatronCritic:
    """The critic, at its start."""
    engine = trained(config, "critic", config.critic, 1.0, config.run.steps)
    return MegatronCritic(engine, config.critic, Guard(config, "critic"))


def sft_engine(config: RunConfig) -> TrainableEngine:
    """The model to be fine-tuned, at its start."""
    shape = ModelShape.from_hf(config.model.hf, config.parallel.tp)
    precision = config.precision.policy
    chunks = build_model(shape, precision, config.megatron)
    if config.sft.init == "pretrained":
        start(chunks, config, "policy", shape)
    return TrainableEngine(chunks, shape, config.sft, 1.0, config.sft.steps, precision)


def trained(
    config: RunConfig, name: ModelName, knobs: BatchSection, temperature: float, steps: int
) -> TrainableEngine:
    """A model with optimizer and a schedule of `steps`, from a Hugging Face checkpoint."""
    chunks, shape = loaded(config, name)
    precision = config.precision.of(name)
    return TrainableEngine(chunks, shape, knobs, temperature, steps, precision)


def loaded(config: RunConfig, name: ModelName) -> tuple[list[Any], ModelShape]:
    """This rank's parts of a model."""
    shape = shape_of(config, name)
    chunks = build_model(shape, config.precision.of(name), config.megatron)
    start(chunks, config, name, shape)
    return chunks, shape


def start(
    chunks: Sequence[torch.nn.Module], config: RunConfig, name: ModelName, shape: ModelShape
) -> None:
    """Fill a model with the weights that it starts from."""
    weights = config.model.weights
    if weights is None or config.own_hf(name) is not None:  # its own may well be model.hf
        load_hf(chunks, config.hf_of(name), shape)
    else:
        of_policy = shape_of(config, "policy")
        load(chunks, MegatronWeights(weights_in(weights, "policy").folder, of_policy), shape)
