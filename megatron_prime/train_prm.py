"""Offline training of an implicit PRM: labelled responses instead of a policy's own.

What teaches is the same as online: a PRM update on a batch of groups with their outcomes, here one
mini-batch of `prm.mini_batch_size` responses a step, one optimizer step, in shuffled epochs. The
result is a Hugging Face checkpoint that gives rewards to a run as it is (`prm.forward = "frozen"`),
starts an online PRM (`prm.hf`), scores texts and ranks answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_prime import figures
from megatron_prime.config import RunConfig
from megatron_prime.data.epochs import Epochs
from megatron_prime.data.labelled import LabelledGroup, as_batch
from megatron_prime.models.prm import MegatronPrm
from megatron_prime.models.scoring import logprobs_of
from megatron_prime.protocols import ScoringModel
from megatron_prime.stage_steps import StageSteps
from megatron_prime.types import Metrics, OldLogprobs, ScoredBatch


def run(
    config: RunConfig,
    prm: MegatronPrm,
    reference: ScoringModel,
    groups: Epochs[LabelledGroup],
    held_out: ScoredBatch | None,
    steps: StageSteps,
) -> None:
    """Take the updates that are left."""
    if steps.done == 0:
        steps.begin(judge(config, prm, held_out))
    for step in steps:
        started = time.perf_counter()
        batch = score(reference, groups.take())
        update = prm.update(batch)
        seconds = time.perf_counter() - started
        found = update.metrics | figures.of_prm_rewards(
            config.prm.beta, batch, update.forward_logprobs
        )
        found |= {"prm/epoch": groups.epochs, "time/step_s": seconds}
        steps.end(step, found | (judge(config, prm, held_out) if steps.judged(step) else {}))


def score(reference: ScoringModel, groups: Sequence[LabelledGroup]) -> ScoredBatch:
    """Groups as a PRM update takes them; no policy takes part."""
    rollouts = as_batch(groups)
    return ScoredBatch(rollouts, OldLogprobs.none(rollouts), reference.logprobs(rollouts))


def judge(config: RunConfig, prm: MegatronPrm, held_out: ScoredBatch | None) -> Metrics:
    """How well the PRM judges what it does not learn."""
    if held_out is None:
        return {}
    logprobs = logprobs_of(prm.engine, held_out.rollouts.sequences)
    return figures.of_held_out(config.prm, held_out, logprobs)
