"""Checks that several commands share: a model against its shards and lengths, a file, a batch.

Each yields what is wrong, a line with the knob to change; without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_prime import precision_rules
from megatron_prime.config import BatchSection, ModelName, RunConfig
from megatron_prime.families import MODEL_TYPES, max_positions, with_defaults
from megatron_prime.options import OptimizerSection

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CP, VPP = "context_parallel_size", "virtual_pipeline_model_parallel_size"


def check_model(
    config: RunConfig, knob: str, folder: Path, lengths: dict[str, int], roles: Iterable[ModelName]
) -> Iterator[str]:
    """Whether the model in `folder` exists, is long enough, and can be cut as `[megatron]` says and
    multiplied as `[precision]` says for `roles`."""
    path = folder / "config.json"
    try:
        model = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        yield f"{knob}: no {path}; wanted the directory of a Hugging Face checkpoint"
        return
    except json.JSONDecodeError as error:
        yield f"{knob}: {path} is not JSON ({error}); download the checkpoint again"
        return
    if model.get("model_type") not in MODEL_TYPES:
        yield (
            f"{knob}: found model_type {model.get('model_type')!r} in {path}, "
            f"supported: {', '.join(MODEL_TYPES)}"
        )
        return
    sizes = config.parallel
    stages = f"{PP} * megatron.{VPP}" if sizes.vpp > 1 else PP
    parts = {
        "num_attention_heads": (TP, sizes.tp),
        "num_key_value_heads": (TP, sizes.tp),
        "intermediate_size": (TP, sizes.tp),
        "num_hidden_layers": (stages, sizes.pp * sizes.vpp),
    }
    model = with_defaults(model)
    wanted = (*parts, "hidden_size", "max_position_embeddings")
    if missing := [key for key in wanted if key not in model]:
        yield f"{knob}: {path} lacks {', '.join(missing)}; is it a whole checkpoint?"
        return
    for key, (option, size) in parts.items():
        if model[key] % size:
            yield (
                f"megatron.{option}: found {size}, which does not divide {key} = {model[key]} "
                f"of {knob}"
            )
    for role in roles:
        yield from precision_rules.shape_problems(
            role, config.precision.of(role), model, knob, sizes.tp, sizes.pp
        )
    room = max_positions(model)
    if sum(lengths.values()) > room:
        yield (
            f"{_sum(lengths)} tokens, more than the {room} of max_position_embeddings or "
            f"sliding_window of {knob}; lower it"
        )


def check_vocabulary(config: RunConfig, knob: str, folder: Path) -> Iterator[str]:
    """Whether the model in `folder` has as many tokens as `model.hf`: of others the same ids may be
    other words, or none. Sizes may differ by padding, if both tokenizers are there and agree."""
    found, wanted = (
        _json(path / "config.json").get("vocab_size") for path in (folder, config.model.hf)
    )
    if None in (found, wanted) or found == wanted:
        return
    tokens = [_tokens(_json(path / "tokenizer.json")) for path in (folder, config.model.hf)]
    if tokens[0] is None or tokens[0] != tokens[1]:
        yield (
            f"{knob}: found vocab_size {found} in {folder}, wanted {wanted} as in model.hf, or the "
            "same tokens in both tokenizer.json; take a checkpoint with the tokenizer of model.hf"
        )


def _json(path: Path) -> dict[str, Any]:
    """What the file says; nothing if it isn't there or no JSON."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # a model without it, or a folder without a model
        return {}
    return found if isinstance(found, dict) else {}


def _tokens(tokenizer: dict[str, Any]) -> dict[str, int] | None:
    """The ids of a tokenizer.json's tokens; None if it has no table of them."""
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return None
    return {
        **vocabulary,
        **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])},
    }


def _sum(lengths: dict[str, int]) -> str:
    found = " + ".join(str(length) for length in lengths.values())
    total = f" = {sum(lengths.values())}" if len(lengths) > 1 else ""
    return f"{', '.join(lengths)}: found {found}{total}"


def check_file(knob: str, path: Path) -> Iterator[str]:
    """Whether there is such a file."""
    if not path.is_file():
        yield f"{knob}: no file {path}; relative paths start at the working directory"


def check_policy_in(knob: str, folder: Path) -> Iterator[str]:
    """Whether what a run saved in `folder`, if a run did, is a policy."""
    if (folder / "run.json").exists() and not (folder / "policy").is_dir():
        models = [name for name in ("prm", "critic") if (folder / name).is_dir()]
        found = f"only {' and '.join(models)}" if models else "no model"
    elif (folder.parent / "run.json").exists() and folder.name in ("prm", "critic"):
        found = f"the {folder.name}"
    else:
        return
    yield (
        f"{knob}: found {found} of a run in {folder}, wanted a policy: the step_… of a run of "
        "train or sft; what train_prm made is for prm.hf (tools/convert_megatron_to_hf.py "
        "--model prm)"
    )


def check_schedule(table: str, knobs: OptimizerSection, steps: int, length: str) -> Iterator[str]:
    """Whether `steps`, which the knob `length` sets, leave something to the cosine."""
    if knobs.schedule == "cosine" and knobs.warmup_steps >= steps:
        yield (
            f"{table}.warmup_steps: found {knobs.warmup_steps}, wanted fewer than {length} = "
            f"{steps}: nothing would be left for the cosine"
        )


def check_shares(
    table: str, knobs: BatchSection, config: RunConfig, world_size: int | None
) -> Iterator[str]:
    """Whether data-parallel ranks can share a mini-batch of the table `table` evenly."""
    sizes = config.parallel
    replicas = max(1, (world_size or 1) // sizes.replica)
    if knobs.mini_batch_size % replicas:
        yield (
            f"{table}.mini_batch_size: found {knobs.mini_batch_size}, wanted a multiple of the "
            f"{replicas} data-parallel replicas"
        )
    elif sizes.vpp > 1 and knobs.mini_batch_size % (replicas * sizes.pp):
        yield (
            f"{table}.mini_batch_size: found {knobs.mini_batch_size}, wanted a multiple of "
            f"{replicas} * {sizes.pp}: with megatron.{VPP} each of the {replicas} data-parallel "
            f"replicas takes a multiple of {sizes.pp} micro-batches, one for each pipeline stage"
        )


def check_micro_batch(
    table: str, knobs: BatchSection, config: RunConfig, lengths: dict[str, int]
) -> Iterator[str]:
    """Whether a sequence as long as `lengths`, knobs with their values, fits into a pack."""
    cp = config.parallel.cp
    longest = -(-sum(lengths.values()) // (2 * cp)) * 2 if cp > 1 else sum(lengths.values())
    if knobs.micro_batch_tokens < longest:
        yield (
            f"{table}.micro_batch_tokens: found {knobs.micro_batch_tokens}, wanted {longest} or "
            f"more: one sequence must fit ({' + '.join(lengths)}"
            f"{f', over {cp} context-parallel ranks' if cp > 1 else ''})"
        )
