"""Generation without training: greedy accuracy on held-out prompts, and rollouts to disk."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prime import figures
from megatron_prime.config import RunConfig
from megatron_prime.protocols import (
    Phase,
    PromptStream,
    Ranks,
    Recorder,
    Roles,
    RolloutEngine,
    Verifier,
)
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


def rollouts_only(
    config: RunConfig,
    prompts: PromptStream,
    engine: RolloutEngine,
    verifier: Verifier,
    ranks: Ranks,
    recorder: Recorder,
) -> None:
    """One generation round for each of `run.steps`, with the seeds of a training run's first."""
    knobs = config.rollout
    for step in range(1, config.run.steps + 1):
        taken = prompts.take(knobs.prompts_per_round or knobs.prompts_per_step)
        seed = config.sampling_seed(step, 0)
        sampling = Sampling(knobs.group_size, knobs.temperature, knobs.max_response_length, seed)
        groups = ranks.gather(verifier.verify(engine.generate(taken, sampling)), taken)
        recorder.rollouts(step, groups)
        recorder.log(step, figures.of_rollouts(groups, groups, rounds=1))
