"""PRIME, top to bottom. Read this file first: one function per stage, in the order of the paper.

Every rank runs this same code, on values that are the same everywhere. A role hides how it is
sharded; the scheduler decides what lies on the devices inside `with gpus.phase(...)`.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime import figures
from megatron_prime import types as t
from megatron_prime.algorithm.advantage import prime_advantages
from megatron_prime.algorithm.filtering import passes
from megatron_prime.algorithm.gae import gae_advantages
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.config import RunConfig
from megatron_prime.errors import BatchNotFilled, Interrupted
from megatron_prime.evaluation import evaluate, sampling_of
from megatron_prime.protocols import Phase, Roles
from megatron_prime.value_batch import ValueBatch


def run(config: RunConfig, roles: Roles, state: t.LoopState) -> None:
    """Train from `state` (a fresh one, or a checkpoint's) to `config.run.steps`."""
    mixed, masked = config.rollout.keep_partial, config.filter.truncated == "mask"
    sync_weights(roles)
    if state.step == 0:
        roles.recorder.log(0, evaluate(config, roles) | roles.gpus.take_seconds())
    for step in range(state.step + 1, config.run.steps + 1):
        groups, surplus, metrics = collect(config, roles, step, state.surplus)
        scored = score(roles, t.RolloutBatch.from_groups(groups, mixed, masked))
        process_rewards, of_prm = learn_process_rewards(config, roles, scored)
        batch, of_critic = with_advantages(config, roles, scored, process_rewards)
        with roles.gpus.phase(Phase.UPDATE_POLICY):
            update = roles.policy.update(batch)
        sync_weights(roles)
        state = t.LoopState(step, keep_surplus(roles, surplus, mixed))
        metrics |= of_prm | of_critic | update.metrics | figures.of_batch(batch, update, config)
        if config.is_due(step, config.evaluate.every):
            metrics |= evaluate(config, roles)
        seconds = figures.of_time(roles.gpus.take_seconds(), metrics["rollout/tokens"])
        roles.recorder.log(step, metrics | seconds | roles.gpus.take_memory())  # before saving
        if (stop := roles.signals.asked()) or config.is_due(step, config.checkpoint.every):
            with roles.gpus.phase(Phase.CHECKPOINT):
                roles.checkpoints.save(state)
        if stop:
            raise Interrupted(f"{stop}: saved step {step}; the same command continues from there")


def collect(config: RunConfig, roles: Roles, step: int, surplus: t.Groups) -> t.Collected:
    """Roll out, verify, filter; again until the batch is full. Returns batch, surplus, figures."""
    knobs, goal, window = config.rollout, config.rollout.prompts_per_step, config.filter
    kept, seen = list(surplus), list[t.VerifiedGroup]()
    with roles.gpus.phase(Phase.GENERATE):
        for round_ in range(knobs.max_rounds):
            prompts = roles.prompts.take(knobs.prompts_per_round or goal)
            missing = max(1, goal - len(kept))
            enough = roles.ranks.tally(missing, window) if knobs.abort_surplus else None
            rollouts = roles.engine.generate(prompts, sampling_of(config, step, round_), enough)
            verified = roles.ranks.gather(roles.verifier.verify(rollouts, enough), prompts, enough)
            roles.prompts.put_back(aborted := t.unanswered(prompts, verified))
            seen += verified
            kept += [group for group in verified if passes(group, window)]
            roles.recorder.progress("prompts in the window", len(kept), goal)
            if len(kept) >= goal:
                break
        else:
            raise BatchNotFilled(figures.explain_unfilled(config, step, kept, seen))
    roles.recorder.rollouts(step, seen)
    batch, surplus = tuple(kept[:goal]), tuple(kept[goal:])
    found = figures.of_rollouts(seen, batch, rounds=round_ + 1, aborted=len(aborted))
    return batch, surplus, found | roles.engine.take_metrics()


def score(roles: Roles, rollouts: t.RolloutBatch) -> t.ScoredBatch:
    """Forwards without gradients: the reference's; the policy's of what its update can't give."""
    with roles.gpus.phase(Phase.SCORE):
        ref = None if roles.reference is None else roles.reference.logprobs(rollouts)
        as_reference = roles.prm is not None and ref is None  # the policy is what it is compared to
        old = roles.policy.old_logprobs(rollouts, every_row=as_reference)
        return t.ScoredBatch(rollouts, old, old.logprobs if as_reference else ref)


def learn_process_rewards(
    config: RunConfig, roles: Roles, scored: t.ScoredBatch
) -> tuple[Tensor | None, t.Metrics]:
    """Train the PRM on outcomes; r_t = beta log(prm / ref) by the forward `prm.forward` names."""
    if roles.prm is None or scored.ref_logprobs is None:
        return None, {}
    rows, knobs, forward = scored.rollouts, config.prm, config.prm.forward
    with roles.gpus.phase(Phase.UPDATE_PRM):
        before = roles.prm.logprobs(rows) if forward == "single_strict" else None
        update = roles.prm.update(scored)
        after = roles.prm.logprobs(rows) if forward == "double" or knobs.measure_after else None
    seen = update.forward_logprobs if before is None else before
    chosen = after if after is not None and forward == "double" else seen
    reward = implicit_rewards(chosen, scored.ref_logprobs, rows.response_mask, knobs.beta)
    return reward, update.metrics | figures.of_prm(knobs, scored, seen, after, roles.policy.version)


def with_advantages(
    config: RunConfig, roles: Roles, scored: t.ScoredBatch, process_rewards: Tensor | None
) -> tuple[t.TrainBatch, t.Metrics]:
    """Advantages of both rewards, on the whole batch, alike on all ranks; a critic learns."""
    rows = scored.rollouts
    given = process_rewards, rows.outcome_rewards, rows.response_mask
    how = config.advantage, roles.steps.step_ends(rows), rows.learns
    if roles.critic is None:
        advantages = prime_advantages(*given, rows.group_size, *how)
        return t.TrainBatch(scored, process_rewards, advantages), {}
    with roles.gpus.phase(Phase.UPDATE_CRITIC):
        values = roles.critic.values(rows)
        advantages, returns, to_come = gae_advantages(*given, values, *how)
        of_critic = roles.critic.update(ValueBatch(rows, values, returns, to_come))
    return t.TrainBatch(scored, process_rewards, advantages), of_critic


def sync_weights(roles: Roles) -> None:
    """Reshard the policy into the rollout engine; its rollouts carry the policy's version."""
    if roles.engine.version != roles.policy.version:
        with roles.gpus.phase(Phase.SYNC_WEIGHTS):
            roles.engine.load_weights(roles.policy.weights(), roles.policy.version)


def keep_surplus(roles: Roles, surplus: t.Groups, mixed: bool) -> t.Groups:
    """Groups for the next step: of one policy, unless `mixed`; the others' prompts go back."""
    stale = [g for g in surplus if not mixed and g.policy_version != roles.policy.version]
    roles.prompts.put_back([group.prompt for group in stale])
    return tuple(group for group in surplus if group not in stale)
