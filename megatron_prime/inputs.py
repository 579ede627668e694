"""From a run's configuration to its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prime.benchmarks.load import load_set
from megatron_prime.config import RunConfig
from megatron_prime.data.prompts import PromptStream, load_prompts
from megatron_prime.data.rows import DataError
from megatron_prime.known_sets import max_tokens_of
from megatron_prime.rollout.recorded import RecordedRollouts
from megatron_prime.types import EvalSet, Prompt
from megatron_prime.verify.door import check_sandbox, malformed_tests


def prompt_stream(config: RunConfig, tokenizer: Any) -> PromptStream | RecordedRollouts:
    """The training prompts, or the recorded groups of `debug.rollouts_from`."""
    if config.debug.rollouts_from is not None:
        return RecordedRollouts(config.debug.rollouts_from, dist.get_rank(), dist.get_world_size())
    return PromptStream(prompts_of(config, config.data.train, tokenizer), config.run.seed)


def eval_prompts(config: RunConfig, tokenizer: Any) -> tuple[Prompt, ...]:
    """The held-out prompts, as many as `evaluate.max_prompts` says; none without an engine."""
    if config.data.eval is None or config.debug.rollouts_from is not None:
        return ()
    return prompts_of(config, config.data.eval, tokenizer)[: config.evaluate.max_prompts or None]


def eval_sets(config: RunConfig, tokenizer: Any) -> tuple[EvalSet, ...]:
    """The benchmark sets of `evaluate.sets`; none without an engine."""
    data, knobs, otherwise = config.data, config.evaluate, config.rollout.max_response_length
    if config.debug.rollouts_from is not None:
        return ()
    sets = tuple(
        load_set(
            name,
            path,
            tokenizer,
            data.template,
            data.max_prompt_length,
            max_tokens_of(name, knobs.max_response_length, otherwise),
            knobs.max_prompts,
        )
        for name, path in knobs.sets.items()
    )
    for problems in sets:
        _check_programs(config, knobs.sets[problems.name], problems.prompts)
    return sets


def prompts_of(config: RunConfig, path: Path, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of a file; says how many were too long. Programs need tests and a sandbox."""
    data = config.data
    found = load_prompts(path, tokenizer, data.template, data.max_prompt_length)
    _check_programs(config, path, found.prompts)
    report_dropped(path, len(found.prompts), found.dropped_long, "data.max_prompt_length")
    return found.prompts


def _check_programs(config: RunConfig, path: Path, prompts: Sequence[Prompt]) -> None:
    """Refuse malformed tests, and programs that nothing would hold."""
    if programs := [prompt for prompt in prompts if prompt.ability == "code"]:
        if problems := malformed_tests(programs):
            raise DataError("\n".join([f"{path}: malformed tests:", *problems]))
        check_sandbox(config.verify, loud=dist.get_rank() == 0)


def report_dropped(path: Path, kept: int, dropped: int, knob: str) -> None:
    """Say on rank 0 that rows were left out for their length."""
    if dropped and dist.get_rank() == 0:
        print(f"{path}: {kept} rows, {dropped} more dropped as longer than {knob}", flush=True)
