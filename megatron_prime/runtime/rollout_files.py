"""Verified groups on disk: one JSON object a line, one file for each step.

`rollouts/step_000016.jsonl` holds everything that training needs of a step's rollouts: token ids,
the engine's log-probs, texts and outcome rewards, of the groups that failed the filter, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_prime.errors import RunError
from megatron_prime.types import VerifiedGroup

_GROUP = TypeAdapter(VerifiedGroup)


class RolloutFileError(RunError, ValueError):
    """Rollouts on disk that can't be read; the message names file and line."""


def write_step(folder: Path, step: int, groups: Sequence[VerifiedGroup]) -> None:
    """Write the groups of `step`, in place of what was there; never half a file of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(b"".join(_GROUP.dump_json(group) + b"\n" for group in groups))
    unfinished.replace(path)


def read_steps(folder: Path) -> Iterator[VerifiedGroup]:
    """All groups, in the order of their steps; RolloutFileError if there is no file."""
    files = sorted(folder.glob("step_*.jsonl"))
    if not files:
        raise RolloutFileError(
            f"debug.rollouts_from: found no step_*.jsonl in {folder}, wanted what "
            "debug.save_rollouts or `python -m megatron_prime rollout` wrote"
        )
    for path in files:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                yield _GROUP.validate_json(line)
            except ValidationError as error:
                raise RolloutFileError(
                    f"{path}, line {number}: not a verified group ({error.error_count()} faults); "
                    "remove the line or write the file again"
                ) from error
