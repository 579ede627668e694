"""Which knobs of the critic go with which others; without torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prime.config import CriticSection, RunConfig


def problems(config: RunConfig) -> Iterator[str]:
    """Knobs that are set of a critic that the run has not, a line each."""
    if "critic" in config.models:
        return
    why = (
        f'but advantage.estimator = "{config.advantage.estimator}" has no critic; remove it, or '
        'set advantage.estimator = "gae"'
    )
    if config.advantage.gae_lambda != 1:
        yield f"advantage.gae_lambda: found {config.advantage.gae_lambda:g}, {why}"
    default = CriticSection()
    for knob in CriticSection.model_fields:
        if (value := getattr(config.critic, knob)) != getattr(default, knob):
            yield f"critic.{knob}: found {value}, {why}"
