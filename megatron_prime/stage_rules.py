"""Which knobs and files `sft`, `train_prm` and `score` want; without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_prime import evaluate_rules, prm_rules
from megatron_prime.common_rules import (
    check_file,
    check_micro_batch,
    check_model,
    check_schedule,
    check_shares,
    check_vocabulary,
)
from megatron_prime.config import RunConfig


def of_fine_tuning(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """What stands in the way of `sft`, a line each."""
    sft = config.sft
    length = {"sft.max_length": sft.max_length}
    yield from check_model(config, "model.hf", config.model.hf, length, ("policy",))
    if sft.data is None:
        yield "sft.data: missing; set it to a chat jsonl, in the TOML file or with --sft.data=…"
    else:
        yield from check_file("sft.data", sft.data)
    if sft.held_out is not None:
        yield from check_file("sft.held_out", sft.held_out)
    yield from check_schedule("sft", sft, sft.steps, "sft.steps")
    yield from check_shares("sft", sft, config, world_size)
    yield from check_micro_batch("sft", sft, config, length)


def of_prm_training(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """What stands in the way of `train_prm`, a line each."""
    knobs, prm, group_size = config.train_prm, config.prm, config.rollout.group_size
    length = {"train_prm.max_length": knobs.max_length}
    yield from check_model(config, "model.hf", config.model.hf, length, ("reference",))
    start = prm.hf or config.model.hf
    yield from check_model(config, "prm.hf" if prm.hf else "model.hf", start, length, ("prm",))
    if prm.hf is not None:
        yield from check_vocabulary(config, "prm.hf", prm.hf)
    if knobs.data is None:
        yield "train_prm.data: missing; set it to a file of labelled responses, or to a rollouts/"
    for name in ("data", "held_out"):
        path: Path | None = getattr(knobs, name)
        if path is not None and not path.is_dir():
            yield from check_file(f"train_prm.{name}", path)
    if prm.forward == "frozen":
        yield (
            'prm.forward: found "frozen", but train_prm trains the PRM; remove it here, and set it '
            "for the run that takes what comes out"
        )
    if prm.reference == "policy":
        yield (
            'prm.reference: found "policy", but labelled responses have no policy beside them; '
            'take "frozen": the reference is model.hf'
        )
    of_pairs = list(prm_rules.of_pairs(config))
    yield from of_pairs
    if not of_pairs and prm.mini_batch_size % group_size:
        yield (
            f"prm.mini_batch_size: found {prm.mini_batch_size}, wanted a multiple of "
            f"rollout.group_size = {group_size}: a step takes whole groups of responses to a prompt"
        )
    yield from check_schedule("prm", prm, knobs.steps, "train_prm.steps")
    yield from check_shares("prm", prm, config, world_size)
    yield from check_micro_batch("prm", prm, config, length)


def of_scoring(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """What stands in the way of `score`, a line each."""
    knobs = config.score
    whole = config.model_copy(update={"megatron": {}})
    yield from check_model(whole, "model.hf", config.model.hf, {}, ())  # the tokenizer's
    if knobs.input is None:
        yield "score.input: missing; set it to a file of texts, in the TOML or with --score.input=…"
    else:
        yield from check_file("score.input", knobs.input)
    output = config.score_output
    if output.suffix != ".jsonl":
        yield f"score.output: found {output}, wanted a name that ends with .jsonl"
    elif knobs.input is not None and output.resolve() == knobs.input.resolve():
        yield (
            f"score.output: found {output}, which is score.input; wanted another file: scores are "
            "no texts, and would be written behind them"
        )
    if knobs.prm is None:
        yield "score.prm: missing; set it to the trained PRM's directory"
        return
    if not knobs.prm.is_dir():
        yield (
            f"score.prm: no directory {knobs.prm}; wanted a Hugging Face checkpoint or a run's "
            "checkpoints/step_…"
        )
        return
    yield from evaluate_rules.other_beta(knobs.prm, config)
    if not (knobs.prm / "run.json").exists():
        yield from check_model(config, "score.prm", knobs.prm, {}, ("prm",))
        yield from check_vocabulary(config, "score.prm", knobs.prm)
    if knobs.reference is not None:
        yield from check_model(config, "score.reference", knobs.reference, {}, ("reference",))
        yield from check_vocabulary(config, "score.reference", knobs.reference)
    elif why := evaluate_rules.unnamed_reference(knobs.prm, "score"):
        yield f"score.reference: missing, and {why}"
