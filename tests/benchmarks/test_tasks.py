"""What is asked of a set, and what makes its answers others."""

from __future__ import annotations

import os

import pytest

from megatron_prime.benchmarks.records import EvaluationError
from megatron_prime.benchmarks.tasks import identity, record_of, tasks_of
from megatron_prime.config import RunConfig
from megatron_prime.data.prompts import fingerprint
from megatron_prime.types import EvalSet, Prompt, Rollout, VerifiedGroup

PROMPTS = tuple(Prompt(i, (1, 2, i), str(i), "math", "mine") for i in range(3))
SET = EvalSet("mine", PROMPTS, ("a", "b", "c"), 99)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"12")

    def make(**knobs):
        return RunConfig.model_validate(
            {
                "run": {"folder": tmp_path / "run", "seed": knobs.pop("seed", 0)},
                "model": {"hf": tmp_path / "hf"},
                "data": {"train": "t"},
                "rollout": {"engine": knobs.pop("engine", "local")},
                "evaluate": {"samples": 4, "temperature": 0.5, **knobs},
            }
        )

    return make


def test_each_set_is_answered_greedily_and_by_samples(config, tmp_path):
    greedy, sampled = tasks_of(config(), tmp_path, [SET], rank=1)
    assert (greedy.kind, greedy.sampling.samples, greedy.sampling.temperature) == ("greedy", 1, 0)
    found = sampled.sampling
    assert (sampled.kind, found.samples, found.temperature) == ("sampled", 4, 0.5)
    assert greedy.sampling.max_tokens == found.max_tokens == 99
    assert greedy.records is None, "rank 0 alone has files"
    assert not (tmp_path / "mine").exists()
    assert [t.kind for t in tasks_of(config(greedy=False), tmp_path, [SET], 1)] == ["sampled"]
    assert [t.kind for t in tasks_of(config(samples=0), tmp_path, [SET], 1)] == ["greedy"]


@pytest.mark.parametrize(
    ("knobs", "problems", "changed"),
    [
        ({"temperature": 0.6}, SET, "temperature"),
        ({"samples": 5}, SET, "samples"),
        ({"seed": 1}, SET, "seed"),
        ({"engine": "sglang"}, SET, "engine"),
        ({}, EvalSet("mine", PROMPTS, SET.ids, 98), "max_tokens"),
        ({}, EvalSet("mine", PROMPTS[:2], SET.ids[:2], 99), "problems"),
    ],
)
def test_what_makes_answers_others_is_refused(config, tmp_path, knobs, problems, changed):
    tasks_of(config(), tmp_path, [SET], rank=0)
    tasks_of(config(chunk=1), tmp_path, [SET], rank=0)  # which does not
    with pytest.raises(EvaluationError, match=f"\n  {changed}: found "):
        tasks_of(config(**knobs), tmp_path, [problems], rank=0)


def test_weights_that_were_written_again_are_others(config, tmp_path):
    tasks_of(config(), tmp_path, [SET], rank=0)
    file = tmp_path / "hf" / "model.safetensors"
    before = identity(tmp_path / "hf")
    os.utime(file, ns=(1, 1))
    assert identity(tmp_path / "hf") != before
    with pytest.raises(EvaluationError, match="weights: found "):
        tasks_of(config(), tmp_path, [SET], rank=0)


def test_a_record_keeps_the_answers(config):
    texts = (r"\boxed{1,000}", "none")
    rollouts = tuple(
        Rollout((7, 8, 9)[: 3 - i], (-1.0,) * (3 - i), ("stop", "length")[i], 0, text)
        for i, text in enumerate(texts)
    )
    found = record_of("a", VerifiedGroup(PROMPTS[1], rollouts, (1.0, 0.0), 1))
    assert (found.id, found.row, found.ground_truth) == ("a", 1, "1")
    assert found.prompt_hash == fingerprint([PROMPTS[1]]) != fingerprint([PROMPTS[2]])
    assert found.checker_failures == 1
    told = [(r.text, r.token_ids, r.finish_reason, r.score, r.answer) for r in found.responses]
    assert told == [
        (texts[0], (7, 8, 9), "stop", 1.0, "1000"),
        (texts[1], (7, 8), "length", 0.0, None),
    ]
