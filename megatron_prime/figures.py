"""The figures of a step, from its typed values; names are stable and documented in docs/metrics.md.

Pure functions, computed alike on every rank. `loop.py` merges what they return into one record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from megatron_prime.algorithm import metrics
from megatron_prime.algorithm.filtering import why_not
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.masked import masked_sum
from megatron_prime.algorithm.prm_health import prm_health
from megatron_prime.algorithm.prm_loss import sequence_loss
from megatron_prime.config import PrmSection, RunConfig
from megatron_prime.types import (
    Metrics,
    PolicyUpdate,
    RolloutBatch,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
    outcome_rewards,
)


def of_rollouts(
    generated: Sequence[VerifiedGroup],
    batch: Sequence[VerifiedGroup],
    rounds: int,
    aborted: int = 0,
) -> Metrics:
    """All that was generated in a step (before the filter) and what the filter left.

    `aborted`: prompts that were put back without an answer.
    """
    return {
        **_responses("rollout", generated),
        "rollout/rounds": rounds,
        "rollout/aborted": aborted,
        "verify/failures": sum(group.checker_failures for group in generated),
        "filter/generated": len(generated),
        "filter/kept": len(batch),
        "filter/accuracy": outcome_rewards(batch).mean().item(),
    }


def of_prm(
    knobs: PrmSection, scored: ScoredBatch, before: Tensor, after: Tensor | None, version: int
) -> Metrics:
    """How well sequence rewards order right before wrong answers, before and after the update.

    And the PRM's health before it, when these outcomes had not taught it yet; `version` is the
    policy's.
    """
    taught = {"frozen": version, "double": 0}  # the others learnt from the step before
    staleness = {"prm/staleness": taught.get(knobs.forward, min(1, version))}
    return of_prm_rewards(knobs.beta, scored, before, after) | staleness


def of_prm_rewards(
    beta: float, scored: ScoredBatch, before: Tensor, after: Tensor | None = None
) -> Metrics:
    """Order and health of rewards that log-probs [N, T] of before an update give, and the order
    after it. Where no group has different outcomes there is no order, and no figure of it."""
    rollouts = scored.rollouts
    assert scored.ref_logprobs is not None, "the PRM's rewards need reference log-probs"
    found = {"prm/pair_accuracy_before": before, "prm/pair_accuracy_after": after}
    rewards = {
        name: masked_sum(prm - scored.ref_logprobs, rollouts.response_mask, dim=1)
        for name, prm in found.items()
        if prm is not None and bool(_mixed(rollouts).any())
    }
    accuracies = {
        name: metrics.pair_accuracy(reward, rollouts.outcome_rewards, rollouts.group_size).item()
        for name, reward in rewards.items()
    }
    token_rewards = beta * (before - scored.ref_logprobs)
    health = prm_health(token_rewards, rollouts.outcome_rewards, rollouts.response_mask)
    return accuracies | {f"prm/{name}": value for name, value in health.items()}


def of_held_out(knobs: PrmSection, scored: ScoredBatch, logprobs: Tensor) -> Metrics:
    """Loss, order and health of a PRM with `logprobs` [N, T] on groups that it does not learn.

    The pair accuracy is of groups with different outcomes alone; left out if there are none.
    """
    assert scored.ref_logprobs is not None, "the PRM's rewards need reference log-probs"
    rows = scored.rollouts
    rewards = implicit_rewards(logprobs, scored.ref_logprobs, rows.response_mask, knobs.beta)
    sums, outcomes = rewards.sum(dim=1), rows.outcome_rewards
    figures = {"loss": float(sequence_loss(sums, outcomes, rows.group_size, knobs.loss))}
    mixed = _mixed(rows)
    if bool(mixed.any()):
        accuracy = metrics.pair_accuracy(sums[mixed], outcomes[mixed], rows.group_size)
        figures["pair_accuracy"] = float(accuracy)
    figures |= prm_health(rewards, outcomes, rows.response_mask)
    return {f"held_out/{name}": value for name, value in figures.items()}


def _mixed(rollouts: RolloutBatch) -> Tensor:
    """Which rows are of groups with different outcomes: bool [N]."""
    of_group = rollouts.outcome_rewards.view(-1, rollouts.group_size)
    mixed: Tensor = (of_group != of_group[:, :1]).any(dim=1)
    return mixed.repeat_interleave(rollouts.group_size)


def of_batch(batch: TrainBatch, update: PolicyUpdate, config: RunConfig) -> Metrics:
    """Returns, advantages, and how far the rollout engine is from the trainer's own policy."""
    gamma, alarm = config.advantage.gamma, config.rollout.mismatch_alarm
    rollouts, mask = batch.scored.rollouts, batch.scored.rollouts.response_mask
    returns = metrics.return_metrics(batch.process_rewards, rollouts.outcome_rewards, mask, gamma)
    mismatch = metrics.mismatch_kl(update.old_logprobs, rollouts.rollout_logprobs, mask)
    if alarm is not None:  # what is no number is a cause, too
        mismatch["mismatch_alarm"] = float(not mismatch["mismatch_kl"] <= alarm)
    inside = batch.advantages[mask if rollouts.learns is None else mask & rollouts.learns[:, None]]
    return {
        **{f"{_owner(name)}/{name}": value for name, value in returns.items()},
        **{f"rollout/{name}": value for name, value in mismatch.items()},
        "policy/advantage_mean": inside.mean().item(),
        "policy/advantage_std": inside.std().item(),
    }


def _owner(return_name: str) -> str:
    return "prm" if return_name.startswith("process") else "policy"


def of_evaluation(groups: Sequence[VerifiedGroup]) -> Metrics:
    """Greedy answers to the held-out prompts, one each."""
    failures = sum(group.checker_failures for group in groups)
    return _responses("evaluate", groups) | {"evaluate/failures": failures}


def of_set(name: str, groups: Sequence[VerifiedGroup]) -> Metrics:
    """Greedy answers to a benchmark set; accuracy counts what is wholly right."""
    found = _responses(f"eval/{name}", groups)
    found[f"eval/{name}/accuracy"] = sum(group.accuracy == 1.0 for group in groups) / len(groups)
    failures = sum(group.checker_failures for group in groups)
    return found | {f"eval/{name}/failures": failures}


def _responses(prefix: str, groups: Sequence[VerifiedGroup]) -> Metrics:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
    return {
        f"{prefix}/accuracy": outcome_rewards(groups).mean().item(),
        f"{prefix}/response_length_mean": sum(lengths) / len(lengths),
        f"{prefix}/response_length_max": max(lengths),
        f"{prefix}/tokens": sum(lengths),
        f"{prefix}/truncation_rate": truncated / len(rollouts),
    }


def of_time(seconds: Metrics, tokens: float) -> Metrics:
    """A step's seconds by phase, their sum, and how fast responses were made.

    `time/idle_…` and `time/busy_…` are parts of phases.
    """
    parts = ("time/idle_", "time/busy_")
    whole = sum(value for name, value in seconds.items() if not name.startswith(parts))
    generate = seconds.get("time/generate_s", 0.0)
    rate = {"rollout/tokens_per_s": tokens / generate} if generate > 0 else {}
    return {**seconds, "time/step_s": whole, **rate}


def explain_unfilled(
    config: RunConfig, step: int, kept: Sequence[VerifiedGroup], seen: Sequence[VerifiedGroup]
) -> str:
    """What to tell someone whose prompts are all too easy or too hard."""
    window, accuracies = config.filter, [group.accuracy for group in seen]
    reasons = Counter(why_not(group, window) for group in seen)
    lost = f"{reasons['hard']} were too hard and {reasons['easy']} too easy"
    if reasons["zero_variance"]:
        lost += f", {reasons['zero_variance']} without variance (filter.zero_variance)"
    if reasons["truncated"]:
        lost += f", {reasons['truncated']} with a truncated response (filter.truncated)"
    return (
        f"step {step}: only {len(kept)} of {config.rollout.prompts_per_step} prompts passed the "
        f"accuracy window [{window.min_accuracy}, {window.max_accuracy}] in "
        f"{config.rollout.max_rounds} rounds: of {len(seen)} prompts, {lost} "
        f"(mean accuracy {sum(accuracies) / len(accuracies):.3f}). "
        "Widen the window (filter.min_accuracy, filter.max_accuracy), allow more rounds "
        "(rollout.max_rounds), or bring data nearer to what the policy can do"
    )
