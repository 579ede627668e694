"""Which knobs of the PRM go together; without torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prime.config import RunConfig

OF_PAIRS = ("dpo", "nca")  # losses that compare responses of one group


def problems(config: RunConfig) -> Iterator[str]:
    """Combinations that could teach the PRM nothing, or something else than was meant."""
    if not config.uses_prm:
        return
    prm = config.prm
    yield from of_pairs(config)
    if prm.reference == "policy" and config.rollout.temperature != 1:
        yield (
            f"rollout.temperature: found {config.rollout.temperature}, wanted 1 with "
            'prm.reference = "policy": the policy\'s log-probs are taken at the sampling '
            "temperature, the PRM's at 1, so their ratio would reward tokens for the temperature"
        )
    if prm.forward == "frozen":
        yield from _of_a_frozen_prm(config)


def of_pairs(config: RunConfig) -> Iterator[str]:
    """Losses of pairs want groups, and each of them in one mini-batch."""
    prm, group_size = config.prm, config.rollout.group_size
    if prm.loss in OF_PAIRS and group_size < 2:
        yield (
            f"rollout.group_size: found {group_size}, wanted 2 or more: prm.loss = "
            f'"{prm.loss}" compares responses to one prompt; or take "ce"'
        )
    elif prm.loss in OF_PAIRS and prm.mini_batch_size % group_size:
        yield (
            f"prm.mini_batch_size: found {prm.mini_batch_size}, wanted a multiple of "
            f'rollout.group_size = {group_size}: prm.loss = "{prm.loss}" compares all responses to '
            "a prompt, so one mini-batch must hold them"
        )


def _of_a_frozen_prm(config: RunConfig) -> Iterator[str]:
    prm, precision = config.prm, config.precision.prm
    if prm.hf is None:
        yield (
            'prm.hf: missing with prm.forward = "frozen": a PRM that still is the start model '
            "knows nothing of outcomes and never learns it; set it to a trained PRM's folder"
        )
    if prm.measure_after:
        yield (
            'prm.measure_after: found true with prm.forward = "frozen", where no update changes '
            "what was measured before it; remove it"
        )
    if prm.loss != "ce":
        yield f'prm.loss: found "{prm.loss}" with prm.forward = "frozen", which has none; remove it'
    if precision.fp8 and precision.fp8_recipe == "delayed":
        yield (
            'precision.prm.fp8_recipe: found "delayed" with prm.forward = "frozen", wanted another:'
            ' its scales come from past training steps; take "tensorwise"'
        )
