"""What an evaluation has to answer, with what it has answered already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime import evaluation
from megatron_prime.benchmarks.answers import answer_of
from megatron_prime.benchmarks.records import Record, Records, Response
from megatron_prime.config import RunConfig
from megatron_prime.data.prompts import fingerprint
from megatron_prime.types import EvalSet, Sampling, VerifiedGroup

ROOM = ("mem_fraction_static", "max_running_requests", "max_total_tokens", "chunked_prefill_size")


@dataclass(frozen=True, slots=True)
class Task:
    """A set, and how its problems are answered."""

    problems: EvalSet
    kind: str  # greedy or sampled: the name of the file
    sampling: Sampling
    records: Records | None  # rank 0's

    @property
    def done(self) -> int:
        """How many problems are on disk, as rank 0 knows."""
        return len(self.records.found) if self.records else 0


def tasks_of(config: RunConfig, folder: Path, sets: Sequence[EvalSet], rank: int) -> list[Task]:
    """What is to be answered; RecordsError on rank 0 for records of other options."""
    knobs, chunk = config.evaluate, config.evaluate.chunk
    tasks = []
    for problems in sets:
        kinds = {"greedy": evaluation.greedy(problems.max_tokens)} if knobs.greedy else {}
        if knobs.samples:
            kinds["sampled"] = Sampling(
                knobs.samples,
                knobs.temperature,
                problems.max_tokens,
                seed_of(config, problems.name),
            )
        for kind, sampling in kinds.items():
            path = folder / problems.name / f"{kind}.jsonl"
            options = options_of(config, problems, sampling) if rank == 0 else {}
            total = len(problems.prompts)
            records = Records(path, options, chunk, total) if rank == 0 else None
            tasks.append(Task(problems, kind, sampling, records))
    return tasks


def seed_of(config: RunConfig, name: str) -> int:
    """Of a set's samples: below it random numbers belong to rows, and the row of one set must not
    share its noise with the same row of another."""
    noise = hashlib.blake2b(f"{config.sampling_seed(0, 0)} {name}".encode(), digest_size=6)
    return int.from_bytes(noise.digest())


def options_of(config: RunConfig, problems: EvalSet, sampling: Sampling) -> dict[str, Any]:
    """All that decides on the answers and their scores, but for rounding.

    `[sglang]` goes in whole but for what only shares out room: nobody can say what an option of
    SGLang's does to an answer, and what an evaluation died of must be free to change.
    """
    policy = config.evaluate.policy or config.model.start
    grading = config.verify.model_dump(exclude={"workers"})
    server = config.sglang if config.rollout.engine == "sglang" else {}
    return {
        "policy": str(policy),
        "weights": identity(policy),
        "engine": config.rollout.engine,
        "dtype": config.precision.policy.dtype,
        "fp8_weights": config.rollout.fp8_weights,
        "problems": fingerprint(problems.prompts),  # prompts with template, and gold answers
        "samples": sampling.samples,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        **{f"verify.{name}": value for name, value in grading.items()},
        **{f"sglang.{name}": value for name, value in server.items() if name not in ROOM},
    }


def identity(folder: Path) -> str:
    """16 hex digits that change when a file below `folder` is written again."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        name = str(path.relative_to(folder))
        digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def precision_options(config: RunConfig) -> dict[str, Any]:
    """All number formats that decide on a PRM's rewards: its own and its reference's."""
    return {
        f"precision.{name}.{knob}": value
        for name, options in (
            ("prm", config.precision.prm),
            ("reference", config.precision.reference),
        )
        for knob, value in options.model_dump(mode="json").items()
    }


def record_of(id_: str, group: VerifiedGroup) -> Record:
    """What is kept of a problem's answers."""
    prompt = group.prompt
    return Record(
        id=id_,
        row=prompt.prompt_id,
        prompt_hash=fingerprint([prompt]),
        ground_truth=prompt.ground_truth,
        responses=tuple(
            Response(
                text=rollout.text,
                token_ids=rollout.response_ids,
                finish_reason=rollout.finish_reason,
                score=reward,
                answer=answer_of(rollout.text, prompt.ability),
            )
            for rollout, reward in zip(group.rollouts, group.outcome_rewards, strict=True)
        ),
        checker_failures=group.checker_failures,
    )
