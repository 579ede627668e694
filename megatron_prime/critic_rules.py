"""Which knobs of the critic go with which others; without torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prime.config import RunConfig
from megatron_prime.options import Section


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
    tables: tuple[tuple[str, Section], ...] = (
        ("critic", config.critic),
        ("precision.critic", config.precision.critic),
    )
    for name, table in tables:
        default = type(table)()
        for knob in type(table).model_fields:
            if (value := getattr(table, knob)) != getattr(default, knob):
                yield f"{name}.{knob}: found {value}, {why}"
