"""From a configuration to what `train_prm` learns: labelled groups, and the reference's log-probs.

The reference never changes and the data is known, so by default it speaks once, of everything, and
is dropped before the PRM is built: training then needs the memory of one model. What it said is
kept in the run folder, at its end and every few minutes before, for the same command to go on with.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prime.benchmarks.tasks import identity
from megatron_prime.config import RunConfig
from megatron_prime.data.answered import read_answered
from megatron_prime.data.chat import Tokenizer
from megatron_prime.data.labelled import (
    LabelledGroup,
    LabelledSet,
    as_batch,
    fingerprint,
    labelled_groups,
    sequences_of,
    split,
)
from megatron_prime.data.rows import DataError
from megatron_prime.models.factory import reference_of as loaded_reference
from megatron_prime.models.reference import RememberedReference
from megatron_prime.models.scoring import logprobs_of
from megatron_prime.prm_rules import OF_PAIRS
from megatron_prime.protocols import ScoringModel
from megatron_prime.runtime.distributed import WorldRanks
from megatron_prime.types import OldLogprobs, ScoredBatch, TokenSequence
from megatron_prime.weights.shape import shape_of

KEPT = "reference_logprobs.pt"
KEEP_EVERY_S = 300.0  # what a stop may cost the reference's pass; a file of all so far is written
CHUNK = 256  # sequences whose log-probs are assembled at once, so that one long one pads few

Groups = Sequence[LabelledGroup]


def groups_of(config: RunConfig, tokenizer: Tokenizer, ranks: WorldRanks) -> tuple[Groups, Groups]:
    """What is learnt, and what the PRM is judged by; says what was dropped."""
    knobs = config.train_prm
    assert knobs.data is not None, "validate.check refuses train_prm without its data"
    found = _read(config, knobs.data, tokenizer, True, ranks)
    if knobs.held_out is None:
        return split(found.groups, knobs.held_out_share)
    judged = _read(config, knobs.held_out, tokenizer, False, ranks).groups
    prompts = {group.prompt_ids for group in judged}
    learnt = [group for group in found.groups if group.prompt_ids not in prompts]
    if (shared := len(found.groups) - len(learnt)) and ranks.rank == 0:
        print(f"{knobs.data}: dropped: {shared} groups of prompts that are held out", flush=True)
    if not learnt:
        raise DataError(
            f"found the prompts of all {shared} groups of {knobs.data} in {knobs.held_out}, wanted "
            "train_prm.held_out of other prompts; or leave it out: train_prm.held_out_share"
        )
    return learnt, judged


def _read(
    config: RunConfig, source: Path, tokenizer: Tokenizer, learnt: bool, ranks: WorldRanks
) -> LabelledSet:
    vocabulary = shape_of(config, "reference").vocab_size
    rows = read_answered(source, tokenizer, config.data.template, True, vocabulary)
    size, longest = config.rollout.group_size, config.train_prm.max_length
    mixed_only = learnt and config.prm.loss in OF_PAIRS
    use = "learn" if learnt else f"judge the PRM by in {source}, train_prm.held_out"
    found = labelled_groups(rows, size, longest, mixed_only, use)
    if ranks.rank == 0:
        print(found.told(source), flush=True)
    return found


def reference_of(
    config: RunConfig, learnt: Groups, judged: Groups, ranks: WorldRanks
) -> tuple[ScoringModel, ScoredBatch | None]:
    """The reference of the groups that are learnt, and the others with its log-probs; collective.

    With `train_prm.reference = "once"` no model is left when this returns.
    """
    held_out = [*sequences_of(judged)]
    if config.train_prm.reference == "loaded":
        model = loaded_reference(config, config.prm)
        known = [*_spoken(model.engine, held_out, 0, ranks)]
        return model, _scored(judged, RememberedReference(held_out, _flat(known)))
    everything = [*dict.fromkeys(chain(sequences_of(learnt), held_out))]
    about = {
        "reference": f"{config.model.start} {identity(config.model.start)}",
        "precision": config.precision.reference.model_dump_json(),
        "data": f"{fingerprint(learnt)} {fingerprint(judged)}",
    }
    remembered = RememberedReference(everything, _logprobs(config, everything, about, ranks))
    return remembered, _scored(judged, remembered)


def _logprobs(
    config: RunConfig, sequences: Sequence[TokenSequence], about: dict[str, str], ranks: WorldRanks
) -> Tensor:
    """Log-probs of all responses, one after the other, from where an earlier start was stopped:
    float32 [tokens]; collective."""
    path = config.run.folder / KEPT
    known = ranks.share(_kept(path, about) if ranks.rank == 0 else torch.zeros(0))
    ends = [0, *accumulate(sequence.response_length for sequence in sequences)]
    if len(known) == ends[-1]:
        return known
    engine = loaded_reference(config, config.prm).engine
    parts, kept_at = [known], time.monotonic()
    for part in _spoken(engine, sequences, ends.index(len(known)), ranks):
        parts.append(part)
        if ranks.rank == 0 and time.monotonic() - kept_at > KEEP_EVERY_S:
            _keep(path, about, _flat(parts))
            kept_at = time.monotonic()
    if ranks.rank == 0:
        _keep(path, about, _flat(parts))
    return _flat(parts)


def _scored(groups: Groups, reference: ScoringModel) -> ScoredBatch | None:
    if not groups:
        return None
    rollouts = as_batch(groups)
    return ScoredBatch(rollouts, OldLogprobs.none(rollouts), reference.logprobs(rollouts))


def _spoken(
    engine: Any, sequences: Sequence[TokenSequence], first: int, ranks: WorldRanks
) -> Iterator[Tensor]:
    """Log-probs of the responses from number `first` on, those of a chunk one after the other:
    float32 [tokens]; collective.

    Rank 0 says how far it is: on much data this takes long, and has no steps.
    """
    for start in range(first, len(sequences), CHUNK):
        chunk = sequences[start : start + CHUNK]
        rows = logprobs_of(engine, chunk)
        # A copy, for views would keep the chunk with its padding.
        yield _flat([row[: s.response_length] for row, s in zip(rows, chunk, strict=True)])
        if ranks.rank == 0:
            print(f"reference: {start + len(chunk)} of {len(sequences)} responses", flush=True)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0), *parts])


def _keep(path: Path, about: dict[str, str], logprobs: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        torch.save({"about": about, "logprobs": logprobs}, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _kept(path: Path, about: dict[str, str]) -> Tensor:
    """What an earlier start has kept, if it was of the same data and reference: whole chunks, or
    all. Empty if there is nothing."""
    try:
        saved = torch.load(path, weights_only=True)
        logprobs: Tensor = saved["logprobs"]
        if saved["about"] == about:
            return logprobs
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError):
        pass  # none there, or damaged: it is made again
    return torch.zeros(0)
