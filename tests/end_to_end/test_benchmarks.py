"""`evaluate` on sets: records, figures, PRM scores and a kill, against what others compute."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from job import EVAL, Job, layout, reproducible
from ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SAMPLES = 4
BETA = 0.05


@pytest.fixture(scope="module")
def digits(job: Job) -> Path:
    """The held-out problems of the job in the plain form."""
    rows = [json.loads(line) for line in (job.folder / "eval.jsonl").read_text().splitlines()]
    path = job.folder / "digits.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"d{i}",
                    "problem": row["prompt"][0]["content"],
                    "answer": row["reward_model"]["ground_truth"],
                }
            )
            + "\n"
            for i, row in enumerate(rows)
        )
    )
    return path


@pytest.fixture(scope="module")
def knobs(digits: Path) -> list[str]:
    return [
        f"--evaluate.sets.digits={digits}",
        f"--evaluate.samples={SAMPLES}",
        "--evaluate.temperature=1.0",
        "--evaluate.chunk=5",
    ]


@pytest.fixture(scope="module")
def output(job: Job, knobs: list[str]) -> str:
    """What `evaluate` says of the start model."""
    return job.start("evaluate", 2, "sets", *knobs)


def records(job: Job, name: str, kind: str = "sampled") -> list[dict[str, Any]]:
    path = job.run(name) / "evaluation" / "digits" / f"{kind}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def done(said: str, kind: str) -> list[int]:
    """How many problems were done after each chunk that a command did."""
    return [int(n) for n in re.findall(rf"^digits, {kind}: (\d+) of {EVAL}$", said, re.MULTILINE)]


def answered(found: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Token ids alone."""
    return [[response["token_ids"] for response in record["responses"]] for record in found]


def test_every_problem_is_answered_in_order_and_graded(job: Job, digits: Path, output: str) -> None:
    rows = [json.loads(line) for line in digits.read_text().splitlines()]
    for kind, count in (("greedy", 1), ("sampled", SAMPLES)):
        found = records(job, "sets", kind)
        assert [record["id"] for record in found] == [f"d{i}" for i in range(EVAL)]
        assert len({record["prompt_hash"] for record in found}) == EVAL
        for row, record in zip(rows, found, strict=True):
            assert record["ground_truth"] == row["answer"]
            assert len(record["responses"]) == count
            for response in record["responses"]:
                boxed = re.findall(r"\\boxed\{(\d)\}", response["text"])
                assert response["answer"] == (boxed[-1] if boxed else None)
                assert response["score"] == float(boxed[-1:] == [row["answer"]])
                assert response["finish_reason"] in ("stop", "length")
    distinct = {tuple(ids) for group in answered(records(job, "sets")) for ids in group}
    assert len(distinct) > EVAL, "it sampled"


def test_the_figures_are_those_of_the_records(job: Job, output: str) -> None:
    summary = json.loads((job.run("sets") / "evaluation" / "summary.json").read_text())
    found = summary["sets"]["digits"]
    right = [[r["score"] == 1.0 for r in record["responses"]] for record in records(job, "sets")]
    greedy = [record["responses"][0]["score"] for record in records(job, "sets", "greedy")]
    pairs = [[any(pair) for pair in combinations(row, 2)] for row in right]
    wanted = {
        "avg@4": mean(mean(row) for row in right),
        "pass@2": mean(mean(row) for row in pairs),
        "pass@4": mean(any(row) for row in right),
        "maj@4": mean(voted(record) for record in records(job, "sets")),
    }
    figures = found["sampled"]["figures"]
    assert {name: figures[name]["value"] for name in wanted} == pytest.approx(wanted)
    assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())
    assert found["greedy"]["figures"]["pass@1"]["value"] == pytest.approx(mean(greedy))
    assert found["sampled"]["problems"] == EVAL
    assert f"| digits | {EVAL} | pass@1 | {100 * mean(greedy):.1f} |" in output
    assert "36.9 † (38.14)" in (job.run("sets") / "evaluation" / "summary.md").read_text()


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def voted(record: dict[str, Any]) -> float:
    """The score of the answer with most votes; of several, the one that came first."""
    answers = [r["answer"] for r in record["responses"]]
    votes = Counter(answer for answer in answers if answer is not None)
    best = [a for a in answers if a is not None and votes[a] == max(votes.values())]
    return record["responses"][answers.index(best[0])]["score"] if best else 0.0


@pytest.mark.slow
def test_the_same_command_asks_nothing_twice_and_others_are_refused(
    job: Job, knobs: list[str], output: str
) -> None:
    folder = job.run("sets") / "evaluation"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jsonl", ".json")}
    again = job.start("evaluate", 1, "sets", *knobs)
    assert done(again, "greedy") == done(again, "sampled") == []
    assert "| digits |" in again
    del before[folder / "starts.jsonl"]
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(AssertionError, match="exit status 1") as refused:
        job.start("evaluate", 2, "sets", *knobs, "--evaluate.temperature=0.7")
    assert "temperature: found 0.7, made with 1.0" in str(refused.value)
    assert {path: path.read_bytes() for path in before} == before


@pytest.fixture(scope="module")
def ranked(job: Job, full: str, knobs: list[str], output: str) -> list[dict[str, Any]]:
    """The samples of `sets`, ranked by the trained PRM, on TP 2 × PP 2."""
    prm = job.run(full) / "checkpoints" / "step_000006"
    said = job.start("evaluate", 4, "sets", *knobs, f"--evaluate.prm={prm}")
    assert done(said, "PRM") == [5, 10, EVAL]
    assert done(said, "greedy") == done(said, "sampled") == [], "only the PRM had anything to do"
    return records(job, "sets")


@pytest.mark.slow
def test_prm_scores_are_those_of_transformers(
    job: Job, full: str, ranked: list[dict[str, Any]], digits: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prm_dir = as_hf(job, full, tmp_path / "prm")
    prm = AutoModelForCausalLM.from_pretrained(prm_dir, dtype=torch.float32)
    ref = AutoModelForCausalLM.from_pretrained(job.folder / "start", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "start")
    rows = [json.loads(line) for line in digits.read_text().splitlines()]
    seen = []
    for row, record in zip(rows, ranked, strict=True):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for response in record["responses"]:
            ids = torch.tensor([asked + response["token_ids"]])
            rewards = BETA * (of_response(prm, ids, len(asked)) - of_response(ref, ids, len(asked)))
            found, last = response["prm"], rewards[-1].item()
            wanted = [rewards.min().item(), rewards.sum().item(), last]
            assert [found["min"], found["sum"], found["last"]] == pytest.approx(wanted, abs=2e-6)
            seen.append(found["sum"])
    assert max(map(abs, seen)) > 1e-3, "the PRM has learnt"


def as_hf(job: Job, full: str, out: Path) -> Path:
    """The trained PRM as a Hugging Face directory, by the converter."""
    from megatron_prime.weights.convert import to_hf
    from megatron_prime.weights.convert_plan import Options

    checkpoint = job.run(full) / "checkpoints" / "step_000006" / "prm"
    to_hf(checkpoint, job.folder / "start", out, Options(), lambda *_, **__: None)
    return out


@torch.no_grad()
def of_response(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Log-probs of the response's tokens."""
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[prompt - 1 :, 0]


@pytest.mark.slow
def test_the_best_of_several_is_the_prms_choice(
    job: Job, full: str, ranked: list[dict[str, Any]]
) -> None:
    summary = json.loads((job.run("sets") / "evaluation" / "summary.json").read_text())
    figures = summary["sets"]["digits"]["sampled"]["figures"]
    assert summary["about"]["prm"] == [str(job.run(full) / "checkpoints" / "step_000006")]
    for name in ("min", "sum", "last"):
        for k in (2, 4):
            chosen = [
                max(record["responses"][:k], key=lambda response: response["prm"][name])
                for record in ranked
            ]
            wanted = mean(response["score"] for response in chosen)
            assert figures[f"best@{k} ({name})"]["value"] == pytest.approx(wanted)


@pytest.mark.slow
def test_a_prm_of_hugging_faces_form_scores_alike(
    job: Job, full: str, ranked: list[dict[str, Any]], knobs: list[str], tmp_path: Path
) -> None:
    """Another directory, so the scores are made anew; in another layout."""
    more = [f"--evaluate.prm={as_hf(job, full, tmp_path / 'prm')}", *layout(tp=1, pp=1)]
    more.append(f"--evaluate.reference={job.folder / 'start'}")
    said = job.start("evaluate", 2, "sets", *knobs, *more)
    assert "PRM scores are made anew" in said
    for before, now in zip(ranked, records(job, "sets"), strict=True):
        for one, other in zip(before["responses"], now["responses"], strict=True):
            assert other["prm"] == pytest.approx(one["prm"], abs=2e-6)
            assert {**other, "prm": None} == {**one, "prm": None}


@pytest.mark.slow
def test_after_a_kill_the_same_command_has_the_same_answers(
    job: Job, full: str, knobs: list[str], output: str
) -> None:
    prm = job.run(full) / "checkpoints" / "step_000006"
    slowly = [*knobs, "--evaluate.chunk=1", f"--evaluate.prm={prm}"]
    folder = job.run("killed") / "evaluation" / "digits"
    with Ranks(job, 2, "killed", *slowly, *layout(tp=1, pp=1), command="evaluate") as ranks:
        ranks.wait_for(folder / "sampled.jsonl")
        for process in ranks.processes:
            process.kill()
    kept = (folder / "sampled.jsonl").read_bytes()
    count = kept.count(b"\n")
    assert 0 < count < EVAL, "it was killed in the middle"
    (folder / "sampled.jsonl").write_bytes(kept + b'{"id": "d')  # worse than it was
    said = job.start("evaluate", 2, "killed", *slowly, *layout(tp=1, pp=1))
    assert done(said, "greedy") == []
    assert done(said, "sampled") == [*range(count + 1, EVAL + 1)]
    for kind in ("greedy", "sampled"):
        assert answered(records(job, "killed", kind)) == answered(records(job, "sets", kind))
    summaries = [
        json.loads((job.run(name) / "evaluation" / "summary.json").read_text())["sets"]["digits"]
        for name in ("killed", "sets")
    ]
    for kind in ("greedy", "sampled"):
        killed, whole = (summary[kind]["figures"] for summary in summaries)
        assert whole.items() <= killed.items() or killed.items() <= whole.items()


@pytest.mark.slow
def test_a_runs_checkpoint_is_evaluated_like_its_export(
    job: Job, full: str, knobs: list[str]
) -> None:
    checkpoint = job.run(full) / "checkpoints" / "step_000006"
    job.start("evaluate", 2, "of_checkpoint", *knobs, f"--evaluate.policy={checkpoint}")
    job.start("evaluate", 2, "of_export", *knobs, f"--model.hf={job.run(full) / 'hf'}")
    for kind in ("greedy", "sampled"):
        found, wanted = (records(job, name, kind) for name in ("of_checkpoint", "of_export"))
        assert found == wanted


@pytest.mark.slow
def test_sets_during_training_change_nothing_else(job: Job, full: str, digits: Path) -> None:
    """The held-out prompts again as a set: its figures are theirs."""
    job.start("train", 4, "with_sets", f"--evaluate.sets.digits={digits}")
    expected, found = job.metrics(full), job.metrics("with_sets")
    assert list(found) == list(expected)
    for step, record in found.items():
        own = {name: value for name, value in record.items() if not name.startswith("eval/")}
        assert reproducible(own) == reproducible(expected[step])
        theirs = {n: v for n, v in expected[step].items() if n.startswith("evaluate/")}
        sets = {n.replace("evaluate/", "eval/digits/"): v for n, v in theirs.items()}
        assert {n: v for n, v in record.items() if n.startswith("eval/")} == sets
