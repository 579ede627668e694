"""PRIME, top to bottom. Read this file first: one function per stage, in the order of the paper.

Every rank runs this same code (SPMD). A role hides how it is sharded; the scheduler decides what
lies on the devices inside `with gpus.phase(...)`. Whatever is decided here is decided from values
that are the same on every rank.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime import figures
from megatron_prime.algorithm.advantage import prime_advantages
from megatron_prime.algorithm.filtering import within_accuracy_window
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.config import RunConfig
from megatron_prime.protocols import Phase, Roles
from megatron_prime.types import (
    LoopState,
    Metrics,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
    outcome_rewards,
)


class BatchNotFilled(RuntimeError):
    """Too few prompts passed the accuracy window within `rollout.max_rounds` rounds."""


def run(config: RunConfig, roles: Roles, state: LoopState) -> None:
    """Train from `state` (a fresh one, or a checkpoint's) to `config.run.steps`."""
    sync_weights(roles)
    if state.step == 0:
        roles.recorder.log(0, evaluate(config, roles))
    for step in range(state.step + 1, config.run.steps + 1):
        groups, surplus, metrics = collect(config, roles, step, state.surplus)
        scored = score(roles, RolloutBatch.from_groups(groups))
        process_rewards, prm_metrics = learn_process_rewards(config, roles, scored)
        batch = TrainBatch(scored, process_rewards, advantages(config, scored, process_rewards))
        with roles.gpus.phase(Phase.UPDATE_POLICY):
            policy_metrics = roles.policy.update(batch)
        sync_weights(roles)
        state = LoopState(step, keep_surplus(roles, surplus))

        metrics |= prm_metrics | policy_metrics | figures.of_batch(batch, config.advantage.gamma)
        if due(step, config.evaluate.every, config.run.steps):
            metrics |= evaluate(config, roles)
        if due(step, config.checkpoint.every, config.run.steps):
            with roles.gpus.phase(Phase.CHECKPOINT):
                roles.checkpoints.save(state)
        seconds = figures.of_time(roles.gpus.take_seconds(), metrics["rollout/tokens"])
        roles.recorder.log(step, metrics | seconds)


def collect(
    config: RunConfig, roles: Roles, step: int, surplus: tuple[VerifiedGroup, ...]
) -> tuple[list[VerifiedGroup], list[VerifiedGroup], Metrics]:
    """Roll out, verify, filter; again until the batch is full. Returns batch, surplus, figures."""
    knobs, window = config.rollout, config.filter
    kept, seen = list(surplus), list[VerifiedGroup]()
    with roles.gpus.phase(Phase.GENERATE):
        for round_ in range(knobs.max_rounds):
            prompts = roles.prompts.take(knobs.prompts_per_round or knobs.prompts_per_step)
            seed = (config.run.seed * 1_000_000 + step) * 1_000 + round_  # a stream of its own
            sampling = Sampling(
                knobs.group_size, knobs.temperature, knobs.max_response_length, seed
            )
            rollouts = roles.engine.generate(prompts, sampling)
            verified = roles.ranks.gather(roles.verifier.verify(rollouts))
            passed = within_accuracy_window(
                outcome_rewards(verified),
                knobs.group_size,
                window.min_accuracy,
                window.max_accuracy,
            )
            seen += verified
            kept += [group for group, passes in zip(verified, passed, strict=True) if passes]
            roles.recorder.progress("prompts in the window", len(kept), knobs.prompts_per_step)
            if len(kept) >= knobs.prompts_per_step:
                break
        else:
            raise BatchNotFilled(figures.explain_unfilled(config, step, kept, seen))
    batch = kept[: knobs.prompts_per_step]
    return batch, kept[len(batch) :], figures.of_rollouts(seen, batch, rounds=round_ + 1)


def score(roles: Roles, rollouts: RolloutBatch) -> ScoredBatch:
    """One forward of the policy and of the reference over the same tokens, without gradients."""
    with roles.gpus.phase(Phase.SCORE):
        return ScoredBatch(
            rollouts,
            old_logprobs=roles.policy.logprobs(rollouts),
            ref_logprobs=None if roles.reference is None else roles.reference.logprobs(rollouts),
        )


def learn_process_rewards(
    config: RunConfig, roles: Roles, scored: ScoredBatch
) -> tuple[Tensor | None, Metrics]:
    """Train the PRM on outcomes; r_t = beta log(prm / ref) by the forward `prm.forward` names."""
    if roles.prm is None or scored.ref_logprobs is None:
        return None, {}
    rollouts, forward = scored.rollouts, config.prm.forward
    with roles.gpus.phase(Phase.UPDATE_PRM):
        before = roles.prm.logprobs(rollouts) if forward == "single_strict" else None
        update = roles.prm.update(scored)
        wants_after = forward == "double" or config.prm.measure_after
        after = roles.prm.logprobs(rollouts) if wants_after else None
    # `single` (the released run) reuses the training forwards: no pass of its own.
    prm_logprobs = {"single": update.forward_logprobs, "single_strict": before, "double": after}[
        forward
    ]
    assert prm_logprobs is not None, f"prm.forward = {forward!r} made no log-probs"
    rewards = implicit_rewards(
        prm_logprobs, scored.ref_logprobs, rollouts.response_mask, config.prm.beta
    )
    seen = before if before is not None else update.forward_logprobs
    return rewards, update.metrics | figures.of_prm(scored, seen, after)


def advantages(
    config: RunConfig, scored: ScoredBatch, process_rewards: Tensor | None
) -> Tensor:  # [N, T]
    """Leave-one-out advantages of both rewards, computed on the whole batch on every rank."""
    rollouts = scored.rollouts
    return prime_advantages(
        process_rewards,
        rollouts.outcome_rewards,
        rollouts.response_mask,
        rollouts.group_size,
        config.advantage,
    )


def sync_weights(roles: Roles) -> None:
    """Reshard the policy into the rollout engine; its rollouts carry the policy's version."""
    if roles.engine.version != roles.policy.version:
        with roles.gpus.phase(Phase.SYNC_WEIGHTS):
            roles.engine.load_weights(roles.policy.export_weights(), roles.policy.version)


def keep_surplus(roles: Roles, surplus: list[VerifiedGroup]) -> tuple[VerifiedGroup, ...]:
    """Groups of the current policy serve the next step; of the others only the prompts go back."""
    current = [group.policy_version == roles.policy.version for group in surplus]
    stale = [group.prompt for group, fresh in zip(surplus, current, strict=True) if not fresh]
    roles.prompts.put_back(stale)
    return tuple(group for group, fresh in zip(surplus, current, strict=True) if fresh)


def evaluate(config: RunConfig, roles: Roles) -> Metrics:
    """Greedy accuracy on the held-out prompts; no prompts, no figures."""
    if not roles.eval_prompts:
        return {}
    with roles.gpus.phase(Phase.EVALUATE):
        greedy = Sampling(1, 0.0, config.rollout.max_response_length, seed=0)
        answers = roles.engine.generate(roles.eval_prompts, greedy)
        return figures.of_evaluation(roles.ranks.gather(roles.verifier.verify(answers)))


def due(step: int, every: int, last: int) -> bool:
    """True on every `every`-th step (0: on none of them) and on the last."""
    return step == last or (every > 0 and step % every == 0)
