"""Which knobs of `[evaluate]` go together, and which files they want; without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_prime.config import RunConfig
from megatron_prime.known_sets import how_to_bring, max_tokens_of

CheckModel = Callable[..., Iterator[str]]


def problems(config: RunConfig, check_model: CheckModel) -> Iterator[str]:
    """What stands in the way of evaluating on `evaluate.sets`, a line each.

    `check_model`: the check of validate.py, which knows how many tokens a model has room for.
    """
    knobs = config.evaluate
    for name, path in knobs.sets.items():
        if not path.is_file():
            yield f"evaluate.sets.{name}: no file {path}; {how_to_bring(name)}"
    whole = config.model_copy(update={"megatron": {}})
    if knobs.sets and not any(check_model(whole, "model.hf", config.model.hf, {}, ())):
        yield from check_model(whole, "model.hf", config.model.hf, longest(config), ())


def command_problems(config: RunConfig, check_model: CheckModel) -> Iterator[str]:
    """What stands in the way of the command `evaluate` alone."""
    knobs = config.evaluate
    if not knobs.sets:
        path = config.data.eval
        if path is None:
            yield "data.eval: missing; set it, or evaluate.sets, to the problems to evaluate on"
        elif not path.is_file():
            yield f"data.eval: no file {path}; relative paths start at the working directory"
        for name in ("samples", "prm", "reference", "policy"):
            if getattr(knobs, name):
                yield f"evaluate.{name}: found without evaluate.sets, which it is for; set both"
        return
    yield from problems(config, check_model)
    if not knobs.greedy and not knobs.samples:
        yield "evaluate.greedy, evaluate.samples: found false and 0, so nothing is asked; set one"
    if knobs.policy is not None and not knobs.policy.is_dir():
        yield f"evaluate.policy: no directory {knobs.policy}; wanted {_CHECKPOINT}"
    if knobs.prm is None:
        if knobs.reference is not None:
            yield "evaluate.reference: found without evaluate.prm; set that, or remove it"
        return
    if knobs.samples < 2:
        yield (
            f"evaluate.samples: found {knobs.samples} with evaluate.prm, which chooses among "
            "several; set it to 2 or more"
        )
    if not knobs.prm.is_dir():
        yield f"evaluate.prm: no directory {knobs.prm}; wanted {_CHECKPOINT}"
    elif knobs.reference is None and (why := unnamed_reference(knobs.prm)):
        yield f"evaluate.reference: missing, and {why}"
    yield from other_beta(knobs.prm, config)
    room = config.prm.micro_batch_tokens * config.parallel.cp
    if sum(longest(config).values()) > room:
        yield (
            f"prm.micro_batch_tokens: found {config.prm.micro_batch_tokens}, wanted room for one "
            f"sequence of {' + '.join(longest(config))} = {sum(longest(config).values())} tokens"
        )


def other_beta(prm: Path, config: RunConfig) -> Iterator[str]:
    """Whether `prm.beta` is another one than the run that made the PRM in `prm` says."""
    try:
        made_with = json.loads((prm / "run.json").read_text())["config"]["prm"]["beta"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # of no run, or damaged, which those tell that must read it
    if made_with != config.prm.beta:
        yield (
            f"prm.beta: found {config.prm.beta}, but the PRM in {prm} was trained with {made_with},"
            " the scale of its rewards; set it to that"
        )


def unnamed_reference(prm: Path, table: str = "evaluate") -> str:
    """Why a PRM's directory doesn't say what its log-ratio is to; nothing if it does: then it is
    the `model.hf` that its run started from."""
    path = prm / "run.json"
    if not path.exists():
        return (
            f"{prm} is no run's checkpoint that would name it; set it to the checkpoint that the "
            "PRM was started from"
        )
    try:
        config = json.loads(path.read_text())["config"]
        made_with, weights = config.get("prm", {}), config.get("model", {}).get("weights")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is damaged; bring it back from a copy, or set it"
    if made_with.get("reference") == "policy":
        return (
            f'{prm} was trained with prm.reference = "policy": its log-ratio is to a policy that '
            "changed at every step, not to the run's model.hf; set it to the policy of that step "
            "as a Hugging Face checkpoint"
        )
    if weights is not None:
        return (
            f"{prm} is of a run that started from model.weights = {weights}; set it to these as a "
            "Hugging Face checkpoint (tools/convert_megatron_to_hf.py)"
        )
    if made_with.get("forward") == "frozen":
        return (
            f'{prm} is of a run with prm.forward = "frozen": its PRM came from elsewhere, and so '
            f"did what it was trained against; set it to that, and {table}.prm to the run's prm.hf"
        )
    return ""


_CHECKPOINT = "a Hugging Face checkpoint or a run's checkpoints/step_…"


def longest(config: RunConfig) -> dict[str, int]:
    """The longest prompt and the longest response of any set, by the knobs that say so."""
    knobs, otherwise = config.evaluate, config.rollout.max_response_length
    limits = [max_tokens_of(name, knobs.max_response_length, otherwise) for name in knobs.sets]
    return {
        "data.max_prompt_length": config.data.max_prompt_length,
        "evaluate.max_response_length": max(limits, default=0),
    }
