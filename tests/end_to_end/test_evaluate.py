"""`evaluate` and the exported model: transformers and the run's own engine agree."""

from __future__ import annotations

import json
import re

import pytest
from job import EVAL, Job

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def output(job: Job, full: str) -> str:
    """What `evaluate` says of the trained model."""
    return job.start("evaluate", 2, "evaluated", f"--model.hf={job.run(full) / 'hf'}")


@pytest.fixture
def answers(job: Job, output: str) -> list[dict[str, object]]:
    lines = (job.run("evaluated") / "evaluation" / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_accuracy_is_that_of_the_last_step(
    job: Job, full: str, output: str, answers: list[dict[str, object]]
) -> None:
    accuracy = job.metrics(full)[6]["evaluate/accuracy"]
    assert f"hf: {accuracy:.1%} of {EVAL} problems" in output
    assert sum(answer["outcome_reward"] == 1.0 for answer in answers) == round(accuracy * EVAL)


def test_every_problem_is_answered_once_in_order(
    job: Job, answers: list[dict[str, object]]
) -> None:
    rows = [json.loads(line) for line in (job.folder / "eval.jsonl").read_text().splitlines()]
    assert [answer["prompt_id"] for answer in answers] == list(range(EVAL))
    for row, answer in zip(rows, answers, strict=True):
        assert answer["ground_truth"] == row["reward_model"]["ground_truth"]
        boxed = re.search(r"\\boxed\{(\d)\}$", str(answer["response"]))
        right = boxed is not None and boxed[1] == answer["ground_truth"]
        assert answer["outcome_reward"] == float(right)


def test_transformers_gives_the_same_answers(
    job: Job, full: str, answers: list[dict[str, object]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = job.run(full) / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in (job.folder / "eval.jsonl").read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        longest = job.config(full).rollout.max_response_length
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == answer["response"]
