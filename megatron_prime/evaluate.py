"""`python -m megatron_prime evaluate`: a model's accuracy on benchmark sets, or on `data.eval`.

In two parts. The rollout engine answers all problems, greedily and by samples, and the verifier
scores them. Then, if there is a PRM, it and its reference are loaded on the ranks as `[megatron]`
says and score the samples, for best-of-N. What is done is on disk (`benchmarks/records.py`), so the
same command continues after a kill, and takes only what is missing: a PRM may come later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megatron_prime import build, evaluation, figures
from megatron_prime.benchmarks.prm_scores import prm_scores
from megatron_prime.benchmarks.records import PrmScores, Scored, Scores
from megatron_prime.benchmarks.summary import Result, as_json, as_markdown, result_of
from megatron_prime.benchmarks.tasks import (
    Task,
    identity,
    precision_options,
    record_of,
    tasks_of,
)
from megatron_prime.config import ParallelSizes, RunConfig
from megatron_prime.data.chat import load_tokenizer
from megatron_prime.inputs import eval_prompts, eval_sets
from megatron_prime.models.scoring import PrmScorer, scoring_config
from megatron_prime.protocols import RolloutEngine, Verifier, WeightSource
from megatron_prime.runtime.distributed import WorldRanks
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.line_files import write_whole
from megatron_prime.types import Prompt, TokenSequence, VerifiedGroup
from megatron_prime.weights.source import weights_of


def evaluate(config: RunConfig, launch: Launch) -> None:
    """The command."""
    if not config.evaluate.sets:
        on_held_out(config, launch)
        return
    tasks = on_sets(config, launch)
    if config.evaluate.prm is not None:
        rank_samples(config, launch, [task for task in tasks if task.kind == "sampled"])
    if launch.here.rank == 0:
        summarize(config, tasks)


def on_sets(config: RunConfig, launch: Launch) -> list[Task]:
    """Answer what is not answered yet."""
    folder = config.run.folder / "evaluation"
    with build.session(config, launch, ParallelSizes()) as ranks, ExitStack() as stack:
        tokenizer = load_tokenizer(config.model.hf)
        tasks = tasks_of(config, folder, eval_sets(config, tokenizer), ranks.rank)
        build.note_start(config, folder, ranks)  # not of a start that was refused
        done = ranks.share([task.done for task in tasks])
        if all(n == len(t.problems.prompts) for n, t in zip(done, tasks, strict=True)):
            return tasks
        verifier = stack.enter_context(build.verifier_pool(config, ranks))
        engine = build.rollout_engine(config, ParallelSizes(), launch, tokenizer, ranks, stack)
        engine.load_weights(policy_weights(config), version=0)
        with launch.steps(agree=None):
            for task, first in zip(tasks, done, strict=True):
                ask(task, first, engine, verifier, ranks, config.evaluate.chunk)
    return tasks


def policy_weights(config: RunConfig) -> WeightSource:
    """Of `evaluate.policy`, or those that training would start from."""
    return weights_of(config.evaluate.policy or config.model.start, config.model.hf)


def ask(
    task: Task,
    done: int,
    engine: RolloutEngine,
    verifier: Verifier,
    ranks: WorldRanks,
    chunk: int,
) -> None:
    """Answer the set's problems from the `done`-th on, a chunk at a time."""
    prompts, ids = task.problems.prompts, task.problems.ids
    for start in range(done, len(prompts), chunk):
        part = prompts[start : start + chunk]
        groups = evaluation.answer(engine, verifier, ranks, part, task.sampling)
        if task.records is not None:
            named = zip(ids[start : start + chunk], groups, strict=True)
            task.records.append([record_of(id_, group) for id_, group in named])
            print(f"{task.problems.name}, {task.kind}: {task.done} of {len(prompts)}", flush=True)


def rank_samples(config: RunConfig, launch: Launch, tasks: Sequence[Task]) -> None:
    """Score the samples with the PRM, what is not scored yet."""
    prm, knobs = config.evaluate.prm, config.evaluate
    assert prm is not None, "asked for with a PRM alone"
    config = scoring_config(config, prm, knobs.reference)
    reference = config.model.hf
    options: dict[str, Any] = {"prm": str(prm), "prm_weights": identity(prm)}
    options |= {"reference": str(reference), "reference_weights": identity(reference)}
    options |= {"beta": config.prm.beta, **precision_options(config)}
    with build.training_session(config, launch, "evaluate", "prm") as ranks:
        chunk = knobs.chunk
        scores = [Scores(task.records, options, chunk) if task.records else None for task in tasks]
        left = ranks.share([score is not None and not score.complete for score in scores])
        if not any(left):
            return
        scorer = PrmScorer.load(config, prm)
        with launch.steps(agree=None):
            for task, score, wanted in zip(tasks, scores, left, strict=True):
                if wanted:
                    score_task(task, score, scorer, config, ranks)


def score_task(
    task: Task,
    scores: Scores | None,
    scorer: PrmScorer,
    config: RunConfig,
    ranks: WorldRanks,
) -> None:
    """Score a set's samples, a chunk at a time, and put the scores into its records."""
    prompts, chunk = task.problems.prompts, config.evaluate.chunk
    done = ranks.share(len(scores.found) if scores else 0)
    for start in range(done, len(prompts), chunk):
        mine = task.records.found[start : start + chunk] if task.records else []
        responses = ranks.share([[r.token_ids for r in record.responses] for record in mine])
        part = prompts[start : start + chunk]
        found = iter(scores_of(part, responses, scorer))
        if scores is not None:
            scores.append(
                [Scored(record.id, tuple(next(found) for _ in record.responses)) for record in mine]
            )
            told = f"{len(scores.found)} of {len(prompts)}"
            print(f"{task.problems.name}, PRM: {told}", flush=True)
    if scores is not None:
        scores.merge()


def scores_of(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[tuple[int, ...]]],
    scorer: PrmScorer,
) -> list[PrmScores]:
    """PRM scores of all responses, one prompt's after the other's; collective."""
    sequences = [
        TokenSequence(prompt.token_ids + ids, len(prompt.token_ids))
        for prompt, group in zip(prompts, responses, strict=True)
        for ids in group
    ]
    return prm_scores(*scorer.rewards(sequences))


def summarize(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Write summary.json and summary.md, and print the latter."""
    folder = config.run.folder / "evaluation"
    results: dict[str, dict[str, Result]] = {}
    rankers = set[str]()
    for task in tasks:
        assert task.records is not None, "rank 0 has them"
        ability = task.problems.prompts[0].ability
        found = result_of(task.records.found, task.kind, ability, config.run.seed)
        results.setdefault(task.problems.name, {})[task.kind] = found
        if any(name.startswith("best@") for name in found.figures):  # now, or by a command before
            noted = task.records.path.with_suffix(".prm.json")
            rankers.add(json.loads(noted.read_text())["prm"])
    about = {
        "policy": str(config.evaluate.policy or config.model.start),
        "prm": sorted(rankers),
        "samples": config.evaluate.samples,
        "temperature": config.evaluate.temperature,
        "seed": config.run.seed,
    }
    write_whole(folder / "summary.json", json.dumps(as_json(results, about), indent=1).encode())
    told = as_markdown(results, about)
    write_whole(folder / "summary.md", told.encode())
    print(told)
    print(f"each answer: {folder}/<set>/greedy.jsonl, sampled.jsonl")


def on_held_out(config: RunConfig, launch: Launch) -> None:
    """Greedy accuracy of `model.hf` on `data.eval`; one record per problem in `evaluation/`."""
    folder = config.run.folder / "evaluation"
    with build.session(config, launch, ParallelSizes()) as ranks, ExitStack() as stack:
        build.note_start(config, folder, ranks)
        tokenizer = load_tokenizer(config.model.hf)
        prompts = eval_prompts(config, tokenizer)
        verifier = stack.enter_context(build.verifier_pool(config, ranks))
        engine = build.rollout_engine(config, ParallelSizes(), launch, tokenizer, ranks, stack)
        engine.load_weights(policy_weights(config), version=0)
        greedy = evaluation.greedy(config.rollout.max_response_length)
        with launch.steps(agree=None):
            groups = evaluation.answer(engine, verifier, ranks, prompts, greedy)
        if ranks.rank == 0:
            records = folder / "answers.jsonl"
            records.write_text("".join(json.dumps(record(group)) + "\n" for group in groups))
            found = figures.of_evaluation(groups)
            accuracy = found["evaluate/accuracy"]
            print(f"{config.model.start}: {accuracy:.1%} of {len(groups)} problems")
            print(f"each answer: {records}")


def record(group: VerifiedGroup) -> dict[str, Any]:
    """One line of answers.jsonl."""
    (rollout,), (reward,) = group.rollouts, group.outcome_rewards
    return {
        "prompt_id": group.prompt.prompt_id,
        "data_source": group.prompt.data_source,
        "ground_truth": group.prompt.ground_truth,
        "response": rollout.text,
        "finish_reason": rollout.finish_reason,
        "outcome_reward": reward,
    }
