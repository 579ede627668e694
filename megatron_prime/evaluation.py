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


def sampling_of(config: RunConfig, step: int, round_: int) -> Sampling:
    """How the prompts of one generation round are continued."""
    knobs, seed = config.rollout, config.sampling_seed(step, round_)
    return Sampling(knobs.group_size, knobs.temperature, knobs.max_response_length, seed)


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
        rollouts = engine.generate(taken, sampling_of(config, step, 0))
        groups = ranks.gather(verifier.verify(rollouts), taken)
        recorder.rollouts(step, groups)
        found = figures.of_rollouts(groups, groups, rounds=1) | engine.take_metrics()
        recorder.log(step, found)
