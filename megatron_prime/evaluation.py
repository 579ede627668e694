"""Generation without training: greedy accuracy of a step, and rollouts to disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
    engine: RolloutEngine,
    verifier: Verifier,
    ranks: Ranks,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> list[VerifiedGroup]:
    """Answers to each prompt, verified; the same list on every rank."""
    return ranks.gather(verifier.verify(engine.generate(prompts, sampling)), prompts)


def greedy(max_tokens: int) -> Sampling:
    """The most likely answer."""
    return Sampling(1, 0.0, max_tokens, seed=0)


def evaluate(config: RunConfig, roles: Roles) -> Metrics:
    """Figures of the policy's greedy answers to `roles.eval_prompts` and `roles.eval_sets`."""
    held_out, found = roles.eval_prompts, Metrics()
    if not held_out and not roles.eval_sets:
        return found
    with roles.gpus.phase(Phase.EVALUATE):
        ask = partial(answer, roles.engine, roles.verifier, roles.ranks)
        if held_out:
            knobs = config.rollout
            found |= figures.of_evaluation(ask(held_out, greedy(knobs.max_response_length)))
        for problems in roles.eval_sets:
            answers = ask(problems.prompts, greedy(problems.max_tokens))
            found |= figures.of_set(problems.name, answers)
    return found


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
