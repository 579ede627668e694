"""Which choices of the algorithm go together; without torch.

A combination that would be something else than its names say, or nothing, is refused with the
reason: a run must not be taken for something that it is not.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prime.config import RunConfig

OF_GROUPS = ("rloo", "grpo")  # estimators that compare a response with others to its prompt


def problems(config: RunConfig) -> Iterator[str]:
    """Combinations that mean nothing, a line each."""
    yield from _estimator(config)
    yield from _granularity(config)
    yield from _filter(config)
    yield from _policy_loss(config)


def _estimator(config: RunConfig) -> Iterator[str]:
    options, group_size = config.advantage, config.rollout.group_size
    if options.estimator in OF_GROUPS and group_size < 2:
        yield (
            f"rollout.group_size: found {group_size}, wanted 2 or more: advantage.estimator = "
            f'"{options.estimator}" compares a response with the others of its prompt'
        )
    if not (options.process_weight or options.outcome_weight):
        yield (
            "advantage.process_weight, advantage.outcome_weight: found 0 for both, wanted one "
            "above 0: all advantages would be 0"
        )
    if not options.group_std and options.estimator != "grpo":
        yield (
            "advantage.group_std: found false with advantage.estimator = "
            f'"{options.estimator}", which divides by no deviation; set that to "grpo", or remove '
            "group_std"
        )
    if options.estimator != "prime_value":
        return
    if not (options.process_weight and options.outcome_weight):
        yield (
            "advantage.process_weight, advantage.outcome_weight: found a 0 with "
            'advantage.estimator = "prime_value", wanted both above 0: the advantage is the '
            'outcome less the value that process rewards add up to; take "reinforce" for one alone'
        )
    if options.gamma != 1:
        yield (
            f'advantage.gamma: found {options.gamma:g} with advantage.estimator = "prime_value", '
            "wanted 1: process rewards add up to a value only undiscounted"
        )


def _granularity(config: RunConfig) -> Iterator[str]:
    options = config.advantage
    if options.granularity != "token" and not options.process_weight:
        yield (
            f'advantage.granularity: found "{options.granularity}" with advantage.process_weight '
            "= 0: there are no process rewards to gather; remove it"
        )
    if options.granularity == "response" and options.estimator == "prime_value":
        yield (
            'advantage.granularity: found "response" with advantage.estimator = "prime_value": a '
            "reward at the last token values nothing that precedes a token, and REINFORCE on the "
            'outcome would remain; take "token" or "step"'
        )


def _filter(config: RunConfig) -> Iterator[str]:
    window = config.filter
    if window.min_accuracy > window.max_accuracy:
        yield (
            f"filter.min_accuracy: found {window.min_accuracy}, above filter.max_accuracy = "
            f"{window.max_accuracy}: no prompt could pass; lower it"
        )
    elif config.rollout.group_size == 1 and window.min_accuracy > 0 and window.max_accuracy < 1:
        yield (
            "filter.min_accuracy, filter.max_accuracy: found "
            f"[{window.min_accuracy}, {window.max_accuracy}] with rollout.group_size = 1, whose "
            "accuracy is 0 or 1: no wrong and no right response could pass; set them to 0 and 1"
        )
    if config.rollout.group_size == 1 and window.zero_variance == "drop":
        yield (
            'filter.zero_variance: found "drop" with rollout.group_size = 1: a single response '
            'has no variance, and no prompt could pass; set it to "keep"'
        )


def _policy_loss(config: RunConfig) -> Iterator[str]:
    loss = config.policy.loss
    high = loss.clip if loss.clip_high is None else loss.clip_high
    if loss.dual_clip is not None and loss.dual_clip <= 1 + high:
        yield (
            f"policy.loss.dual_clip: found {loss.dual_clip:g}, wanted more than 1 + "
            f"{high:g} = {1 + high:g}: bad tokens would lose their gradient before good ones do; "
            "3 is usual"
        )
    if not loss.kl_coefficient:
        return
    if config.uses_prm and config.prm.reference == "policy":
        yield (
            f"policy.loss.kl_coefficient: found {loss.kl_coefficient:g} with prm.reference = "
            '"policy": the only other log-probs are those of the policy before the update, which '
            'the clip holds it to; set it to 0, or prm.reference = "frozen"'
        )
    if config.rollout.temperature != 1:
        yield (
            f"policy.loss.kl_coefficient: found {loss.kl_coefficient:g} with rollout.temperature = "
            f"{config.rollout.temperature:g}: the reference's log-probs are of temperature 1, and "
            "the policy's are not; set one of them to 0 or 1"
        )
