"""Which knobs of sampling and of the policy's loss go together; pure, and without torch.

A token may be sampled by another policy than the one that the trainer scores it with: by the
engine's numerics, always a little, and by an older version, if partial responses are kept. There
are two remedies. Importance weights of trainer / engine probability are for the first alone; a
clipped ratio that starts from the engine's log-probs is for both, and leaves nothing to weigh.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prime.config import RunConfig


def problems(config: RunConfig) -> Iterator[str]:
    """Combinations that would train on something else than was meant, a line each."""
    rollout, policy = config.rollout, config.policy
    if policy.old_logprobs == "rollout" and policy.loss.importance != "none":
        yield (
            f'policy.loss.importance: found "{policy.loss.importance}" with policy.old_logprobs = '
            '"rollout": the ratio that starts from the engine\'s log-probs has these weights in '
            'it already; set one of them to "none" or "trainer"'
        )
    if rollout.keep_partial and policy.old_logprobs != "rollout":
        yield (
            f'policy.old_logprobs: found "{policy.old_logprobs}" with rollout.keep_partial, wanted '
            '"rollout": tokens of older policies need the log-probs that they were sampled with'
        )
    if rollout.keep_partial and not rollout.abort_surplus:
        yield (
            "rollout.keep_partial: found true without rollout.abort_surplus, which is what leaves "
            "responses unfinished; set that to true, too"
        )
