"""Greedy accuracy on held-out prompts, during training and by itself."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prime import figures
from megatron_prime.config import RunConfig
from megatron_prime.protocols import Phase, Ranks, Roles, RolloutEngine, Verifier
from megatron_prime.types import Metrics, Prompt, Sampling, VerifiedGroup


def answer(
    config: RunConfig,
    engine: RolloutEngine,
    verifier: Verifier,
    ranks: Ranks,
    prompts: Sequence[Prompt],
) -> list[VerifiedGroup]:
    """The most likely answer to each prompt, verified; the same list on every rank."""
    greedy = Sampling(1, 0.0, config.rollout.max_response_length, seed=0)
    return ranks.gather(verifier.verify(engine.generate(prompts, greedy)), prompts)


def evaluate(config: RunConfig, roles: Roles) -> Metrics:
    """Figures of the policy's answers to `roles.eval_prompts`; none without prompts."""
    if not roles.eval_prompts:
        return {}
    with roles.gpus.phase(Phase.EVALUATE):
        answers = answer(config, roles.engine, roles.verifier, roles.ranks, roles.eval_prompts)
        return figures.of_evaluation(answers)
