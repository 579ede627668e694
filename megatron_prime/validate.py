"""What is known to be impossible before a run starts: two knobs, or a knob and a file, that clash.

`config.py` checks each knob alone. Here they meet each other, the number of ranks, and the model's
config.json, which is read as plain JSON so that a check on a login node needs no torch. All
problems are found at once; each is one line that names the knob to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prime import (
    algorithm_rules,
    critic_rules,
    evaluate_rules,
    precision_rules,
    prm_rules,
    rollout_rules,
    stage_rules,
)
from megatron_prime.common_rules import (
    CP,
    PP,
    TP,
    VPP,
    check_file,
    check_micro_batch,
    check_model,
    check_policy_in,
    check_schedule,
    check_shares,
    check_vocabulary,
)
from megatron_prime.config import BatchSection, ConfigError, ModelName, RunConfig
from megatron_prime.families import with_defaults

# What Megatron can do and this project can't yet: the only value that runs, and why.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "expert_model_parallel_size": (1, "only dense models are supported"),
    "num_moe_experts": (None, "only dense models are supported"),
}


def check(config: RunConfig, command: str, world_size: int | None) -> None:
    """Refuse a run that `command` (one of __main__'s) could not finish.

    `world_size` is the number of ranks; None if it is not known yet. Raises ConfigError with all
    problems, a line each.
    """
    if command in ("evaluate", "rollout"):  # `[megatron]` matters to a PRM that ranks alone
        problems = list(_of_generation(config, command, world_size))
    else:
        find = {
            "train": _of_training,
            "sft": stage_rules.of_fine_tuning,
            "train_prm": stage_rules.of_prm_training,
            "score": stage_rules.of_scoring,
            "replay": _of_replay,
        }[command]
        parallel = [*_unsupported(config), *_sizes(config), *_precision(config, command)]
        # Without usable sizes nothing can be divided by them.
        problems = parallel or [*_ranks(config, world_size), *find(config, world_size)]
    problems += _start(config)
    if problems:
        raise ConfigError("\n".join(problems))


def models_of(config: RunConfig, command: str) -> tuple[ModelName, ...]:
    """The models that the command builds, by their names in `[precision]`."""
    if command == "evaluate":
        return ("prm", "reference") if config.evaluate.prm is not None else ()
    if command in ("train_prm", "score"):
        return ("prm", "reference")
    return config.models if command in ("train", "replay") else ("policy",)


def _of_training(config: RunConfig, world_size: int | None) -> Iterator[str]:
    roles = models_of(config, "train")
    shared = [role for role in roles if config.own_hf(role) is None]
    yield from check_model(config, "model.hf", config.model.hf, _longest(config), shared)
    yield from check_file("data.train", config.data.train)
    in_fp8 = [role for role in roles if config.precision.of(role).fp8_param]
    if in_fp8 and config.memory.offload == "always":
        yield (
            f'memory.offload: found "always" with precision.{in_fp8[0]}.fp8_param, but weights '
            'in FP8 alone can\'t leave the device; take "never", or remove fp8_param'
        )
    if config.data.eval is not None:
        yield from check_file("data.eval", config.data.eval)
    yield from evaluate_rules.problems(config, check_model)
    yield from _recorded(config.debug.rollouts_from, config.run.folder / "rollouts")
    yield from algorithm_rules.problems(config)
    yield from critic_rules.problems(config)
    yield from rollout_rules.problems(config)
    if config.debug.rollouts_from is None:
        yield from _engine(config, world_size)
    yield from prm_rules.problems(config)
    for role in roles:
        if role not in config.frozen:
            yield from check_schedule(role, config.batches_of(role), config.run.steps, "run.steps")
        if role != "reference":
            yield from _batches(config, role, config.batches_of(role), world_size)
        if (hf := config.own_hf(role)) is not None:
            yield from check_model(config, f"{role}.hf", hf, _longest(config), (role,))
            yield from check_vocabulary(config, f"{role}.hf", hf)


def _start(config: RunConfig) -> Iterator[str]:
    weights = config.model.weights
    if weights is None:
        return
    if not any((weights / n).exists() for n in (".metadata", "run.json")):
        yield (
            f"model.weights: found no distributed checkpoint at {weights}, wanted what "
            "tools/convert_hf_to_megatron.py makes, or a run's checkpoints/step_…"
        )
    yield from check_policy_in("model.weights", weights)


def _recorded(played: Path | None, own: Path) -> Iterator[str]:
    if played is not None and (not played.is_dir() or played.resolve() == own.resolve()):
        yield f"debug.rollouts_from: found {played}, wanted the rollouts/ folder of another run"


def _of_replay(config: RunConfig, _world_size: int | None) -> Iterator[str]:
    yield from check_model(config, "model.hf", config.model.hf, {}, models_of(config, "replay"))


def _of_generation(config: RunConfig, command: str, world_size: int | None) -> Iterator[str]:
    whole = config.model_copy(update={"megatron": {}})
    own_lengths = command == "evaluate" and config.evaluate.sets
    lengths = {} if own_lengths else _longest(config)
    yield from check_model(whole, "model.hf", config.model.hf, lengths, ())
    yield from _engine(config, world_size)
    if command == "rollout":
        yield from check_file("data.train", config.data.train)
        return
    yield from evaluate_rules.command_problems(config, check_model)
    if config.evaluate.policy is not None:
        yield from check_policy_in("evaluate.policy", config.evaluate.policy)
    for name in ("policy", "prm", "reference"):
        if (folder := getattr(config.evaluate, name)) is not None:
            yield from check_vocabulary(config, f"evaluate.{name}", folder)
    if config.evaluate.prm is not None:
        parallel = [*_unsupported(config), *_sizes(config), *_precision(config, command)]
        yield from parallel or _ranks(config, world_size)


def _unsupported(config: RunConfig) -> Iterator[str]:
    for option, (wanted, reason) in UNSUPPORTED.items():
        if (found := config.megatron.get(option, wanted)) != wanted:
            yield f"megatron.{option}: found {found!r}, not supported ({reason}); remove it"


def _sizes(config: RunConfig) -> Iterator[str]:
    for option in (TP, PP, CP, VPP):
        found = config.megatron.get(option, 1)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            yield f"megatron.{option}: found {found!r}, wanted a whole number above 0"
        elif option == VPP and found > 1 and config.parallel.pp == 1:
            yield (
                f"megatron.{VPP}: found {found} without pipeline stages; remove it, or set "
                f"megatron.{PP} to 2 or more"
            )


def _precision(config: RunConfig, command: str) -> Iterator[str]:
    roles = {role: config.precision.of(role) for role in models_of(config, command)}
    for role, options in roles.items():
        yield from precision_rules.option_problems(role, options)
    in_fp8 = [role for role, options in roles.items() if options.fp8]
    yield from precision_rules.megatron_problems(config.megatron, in_fp8)


def _ranks(config: RunConfig, world_size: int | None) -> Iterator[str]:
    sizes = config.parallel
    if world_size is not None and world_size % sizes.replica:
        yield (
            f"megatron.{TP}, megatron.{PP}, megatron.{CP}: found {sizes.tp} * {sizes.pp} * "
            f"{sizes.cp} = {sizes.replica} ranks per replica, which does not divide the run's "
            f"{world_size} ranks; change one of them"
        )


def _engine(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """What the rollout engine can't do with the model; nothing of a model that `_model` refuses."""
    whole = config.model_copy(update={"megatron": {}})
    if not any(check_model(whole, "model.hf", config.model.hf, {}, ())):
        model = with_defaults(json.loads((config.model.hf / "config.json").read_text()))
        yield from rollout_rules.engine_problems(config, model, world_size)


def _longest(config: RunConfig) -> dict[str, int]:
    return {
        "data.max_prompt_length": config.data.max_prompt_length,
        "rollout.max_response_length": config.rollout.max_response_length,
    }


def _batches(
    config: RunConfig, table: str, knobs: BatchSection, world_size: int | None
) -> Iterator[str]:
    rollout = config.rollout
    rollouts = rollout.prompts_per_step * rollout.group_size
    if rollouts % knobs.mini_batch_size:
        yield (
            f"{table}.mini_batch_size: found {knobs.mini_batch_size}, wanted a divisor of "
            f"rollout.prompts_per_step * rollout.group_size = {rollouts}"
        )
    yield from check_shares(table, knobs, config, world_size)
    yield from check_micro_batch(table, knobs, config, _longest(config))
