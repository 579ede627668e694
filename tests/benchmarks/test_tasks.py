"""What is asked of a set, and what makes its answers others."""

from __future__ import annotations

import os

import numpy as np
import pytest

from megatron_prime.benchmarks.tasks import identity, record_of, seed_of, tasks_of
from megatron_prime.config import RunConfig
from megatron_prime.data.prompts import fingerprint
from megatron_prime.rollout.sampling import uniforms
from megatron_prime.runtime.line_files import RecordsError
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
                "verify": knobs.pop("verify", {}),
                "sglang": knobs.pop("sglang", {}),
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
        ({"verify": {"numpy": True}}, SET, "verify.numpy"),
        ({"verify": {"code_test_s": 6}}, SET, "verify.code_test_s"),
        ({"verify": {"code_total_s": 60}}, SET, "verify.code_total_s"),
        ({"verify": {"code_memory_mib": 64}}, SET, "verify.code_memory_mib"),
        ({"verify": {"sandbox": "none"}}, SET, "verify.sandbox"),
        ({"verify": {"timeout_s": 6}}, SET, "verify.timeout_s"),
        ({}, EvalSet("mine", PROMPTS, SET.ids, 98), "max_tokens"),
        ({}, EvalSet("mine", PROMPTS[:2], SET.ids[:2], 99), "problems"),
    ],
)
def test_what_makes_answers_others_is_refused(config, tmp_path, knobs, problems, changed):
    tasks_of(config(), tmp_path, [SET], rank=0)
    tasks_of(config(chunk=1, verify={"workers": 2}), tmp_path, [SET], rank=0)  # which do not
    with pytest.raises(RecordsError, match=f"\n  {changed}: found "):
        tasks_of(config(**knobs), tmp_path, [problems], rank=0)


def test_options_of_the_server_make_answers_others_but_not_its_room(config, tmp_path):
    def of(**options):
        tasks_of(config(engine="sglang", sglang=options), tmp_path, [SET], rank=0)

    of(quantization="fp8", mem_fraction_static=0.9)
    of(quantization="fp8", mem_fraction_static=0.5, max_running_requests=4)
    with pytest.raises(RecordsError, match=r"sglang\.quantization: found None, made with 'fp8"):
        of(mem_fraction_static=0.9)
    with pytest.raises(RecordsError, match=r"sglang\.context_length: found 99, made with None"):
        of(quantization="fp8", context_length=99)


def test_a_row_shares_its_noise_with_no_other_set(config, tmp_path):
    other = EvalSet("yours", PROMPTS, SET.ids, 99)
    tasks = tasks_of(config(greedy=False), tmp_path, [SET, other], rank=1)
    seeds = [task.sampling.seed for task in tasks]
    assert len({*seeds, seed_of(config(seed=1), "mine")}) == 3
    # The same in every process: hash() of text is not.
    assert seeds == [75_752_814_552_443, 131_767_476_805_377]
    noise = [uniforms(seed, 0, 0, 1000) for seed in seeds]
    assert not (noise[0] == noise[1]).any()
    assert abs(float(np.corrcoef(*noise)[0, 1])) < 0.15


def test_weights_that_were_written_again_are_others(config, tmp_path):
    tasks_of(config(), tmp_path, [SET], rank=0)
    file = tmp_path / "hf" / "model.safetensors"
    before = identity(tmp_path / "hf")
    os.utime(file, ns=(1, 1))
    assert identity(tmp_path / "hf") != before
    with pytest.raises(RecordsError, match="weights: found "):
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
