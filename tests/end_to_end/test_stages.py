"""The stages around PRIME by the real command: SFT, rollouts, an offline PRM, scores, a frozen run.

Most prompts of this file ask for the digit 3, so that a PRM taught by labels can know better than
its reference which of two answers to a new prompt is right.
"""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from job import DIGITS, Job, layout, load_quickstart, prompt_row, reproducible
from ranks import Ranks
from test_train import documented

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

ALONE = layout(tp=1, pp=1)
SFT = ["--sft.steps=8", "--checkpoint.every=3", "--evaluate.every=4"]
PRM = ["--train_prm.steps=8", "--checkpoint.every=3", "--evaluate.every=4"]
BETA = 0.05


@pytest.fixture(scope="module")
def rollouts(job: Job) -> Path:
    """The folder of rollouts that the fine-tuned model gave."""
    rng = random.Random(5)
    digits = ["3" if rng.random() < 0.9 else rng.choice(DIGITS) for _ in range(120)]
    rows = [prompt_row(f"{n:03}{digit}=") for n, digit in enumerate(digits)]
    load_quickstart().write_rows(job.folder / "threes.jsonl", rows)
    knobs = [f"--data.train={job.folder / 'threes.jsonl'}", "--run.steps=10", *ALONE]
    job.start_alone("rollout", "threes", *knobs)
    return job.run("threes") / "rollouts"


def of_prm(rollouts: Path, *knobs: str) -> list[str]:
    """The knobs of `train_prm` on the rollouts."""
    data = [f"--train_prm.data={rollouts}", "--train_prm.max_length=40", "--prm.warmup_steps=0"]
    return [*data, "--train_prm.held_out_share=0.2", *knobs]


@pytest.fixture(scope="module")
def trained(job: Job, rollouts: Path) -> Path:
    """A PRM that learnt from the labels of rollouts, as a Hugging Face checkpoint."""
    knobs = of_prm(rollouts, "--train_prm.steps=100", "--prm.lr=4e-3", "--evaluate.every=20")
    job.start_alone("train_prm", "taught", *knobs, "--checkpoint.every=0", *ALONE)
    return job.run("taught") / "hf"


def test_a_prm_learns_from_labels_to_judge_new_prompts(job: Job, trained: Path) -> None:
    steps = job.metrics("taught")
    assert list(steps) == list(range(101))
    judged = {n: s["held_out/pair_accuracy"] for n, s in steps.items() if "held_out/loss" in s}
    assert list(judged) == [0, 20, 40, 60, 80, 100]
    assert steps[0]["held_out/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert judged[100] > 0.65, "chance is 0.5"
    assert steps[100]["held_out/loss"] < 0.8 * steps[0]["held_out/loss"]
    assert steps[100]["prm/epoch"] == pytest.approx(100 * 4 / 96, rel=0.05)
    from matplotlib.image import imread

    assert imread(job.run("taught") / "curves.png")[..., :3].std() > 0.05, "an empty picture"


def test_every_figure_of_prm_training_is_documented(job: Job, trained: Path) -> None:
    found = set[str]().union(*job.metrics("taught").values())
    assert found <= {*documented(), "time/step_s"}
    assert {"held_out/calibration_error", "prm/pair_accuracy_before", "prm/epoch"} <= found


def test_scores_are_those_of_transformers(job: Job, rollouts: Path, trained: Path) -> None:
    """Of texts that somebody typed and of recorded tokens; TP 1 × PP 2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["3,3,\\boxed{3}", "\\boxed{0}", "no"]
    rows: list[dict[str, Any]] = [{"id": "typed", "prompt": "0173=", "responses": texts}]
    recorded = (rollouts / "step_000001.jsonl").read_text().splitlines()[:2]
    source = job.folder / "texts.jsonl"
    source.write_text("\n".join([*map(json.dumps, rows), *recorded]))
    knobs = [f"--score.input={source}", f"--score.prm={trained}", "--score.chunk=2"]
    knobs += [f"--score.reference={job.folder / 'start'}", "--advantage.step_separator=,"]
    job.start("score", 2, "scored", *knobs, *layout(tp=1, pp=2))
    output = job.run("scored") / "scores" / "scores.jsonl"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    groups = [json.loads(line) for line in recorded]
    known = [text for group in groups for text in group["rollouts"]]
    assert [line["text"] for line in lines] == [*texts, *(r["text"] for r in known)]
    assert [line["label"] for line in lines[3:]] == [
        o for g in groups for o in g["outcome_rewards"]
    ]
    assert [line["id"] for line in lines[:3]] == ["typed"] * 3
    prm = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    ref = AutoModelForCausalLM.from_pretrained(job.folder / "start", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "start")
    typed = tokenizer.apply_chat_template(
        [{"role": "user", "content": "0173="}], add_generation_prompt=True, return_dict=False
    )
    prompts = [typed] * 3 + [g["prompt"]["token_ids"] for g in groups for _ in g["rollouts"]]
    for prompt, line in zip(prompts, lines, strict=True):
        ids = torch.tensor([[*prompt, *line["token_ids"]]])
        rewards = BETA * (of_response(prm, ids, len(prompt)) - of_response(ref, ids, len(prompt)))
        assert line["rewards"] == pytest.approx(rewards.tolist(), abs=2e-6)
        assert line["total"] == pytest.approx(rewards.sum().item(), abs=1e-5)
        assert line["probability"] == pytest.approx(rewards.sum().sigmoid().item(), abs=1e-5)
        assert "".join(line["tokens"]) == line["text"]
    steps = lines[0]["steps"]
    assert [lines[0]["text"][slice(*step["characters"])] for step in steps] == [
        "3,",
        "3,",
        "\\boxed{3}",
    ]
    for step in steps:
        assert step["reward"] == pytest.approx(sum(lines[0]["rewards"][slice(*step["tokens"])]))
    assert max(abs(line["total"]) for line in lines) > 0.1, "the PRM has learnt"
    continues_after_a_kill(job, knobs, output)


def continues_after_a_kill(job: Job, knobs: list[str], output: Path) -> None:
    """What was cut off is scored again, and what is there is not."""
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    output.write_bytes(whole[: ends[4] + 9])
    said = job.start("score", 2, "scored", *knobs, *layout(tp=1, pp=2))
    assert "scored: 4 of 11" not in said
    assert "scored: 6 of 11" in said
    assert output.read_bytes() == whole


@torch.no_grad()
def of_response(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Log-probs of the response's tokens."""
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[prompt - 1 :, 0]


def test_a_run_takes_the_offline_prm_as_it_is(job: Job, trained: Path) -> None:
    """Its rewards order the rollouts from the first step on."""
    knobs = [f"--data.train={job.folder / 'threes.jsonl'}", f"--prm.hf={trained}", "--run.steps=2"]
    frozen = ["--prm.forward=frozen", "--prm.measure_after=false", "--evaluate.every=0", *ALONE]
    job.start_alone("train", "with_taught", *knobs, *frozen)
    steps = job.metrics("with_taught")
    assert [steps[n]["prm/staleness"] for n in (1, 2)] == [0, 1]
    assert min(steps[n]["prm/pair_accuracy_before"] for n in (1, 2)) > 0.55
    assert "prm/loss" not in steps[1]


def finish_twice(job: Job, command: str, name: str, ranks: int, *knobs: str) -> str:
    """Hit a run of `command` by SIGUSR1 and by kill -9, and let it finish; what it said at last."""
    with Ranks(job, ranks, name, *knobs, command=command) as hit:
        hit.wait_for_step(1)
        hit.processes[-1].send_signal(signal.SIGUSR1)
        assert set(hit.codes()) == {75}, hit.said
        assert "SIGUSR1: saved step" in hit.said
    with Ranks(job, ranks, name, *knobs, command=command) as hit:
        hit.wait_for_step(5)
        hit.processes[0].kill()
        hit.codes(but=[0])
    return job.start(command, ranks, name, *knobs)


def assert_same(job: Job, one: str, other: str) -> None:
    """Figures and exported weights, bit for bit."""
    expected, found = ({n: plain(r) for n, r in job.metrics(x).items()} for x in (one, other))
    assert found == expected
    hf = [{p.name: p.read_bytes() for p in (job.run(x) / "hf").iterdir()} for x in (one, other)]
    assert "model.safetensors" in hf[0]
    assert hf[0] == hf[1]


def plain(record: dict[str, float]) -> dict[str, float]:
    return {n: v for n, v in reproducible(record).items() if n != "sft/tokens_per_s"}


def sft_knobs(job: Job, name: str) -> list[str]:
    output = f"--sft.output={job.run(name) / 'hf'}"
    held_out = f"--sft.held_out={job.folder / 'sft.jsonl'}"
    return [f"--model.hf={job.folder / 'shape'}", output, held_out, *SFT]


@pytest.mark.parametrize(
    ("ranks", "sizes"), [(1, (1, 1)), pytest.param(4, (2, 2), marks=pytest.mark.slow)]
)
def test_fine_tuning_that_was_hit_is_that_of_one_that_was_not(
    job: Job, ranks: int, sizes: tuple[int, int]
) -> None:
    whole, hit = f"sft_whole_{ranks}", f"sft_hit_{ranks}"
    job.start("sft", ranks, whole, *sft_knobs(job, whole), *layout(*sizes))
    finish_twice(job, "sft", hit, ranks, *sft_knobs(job, hit), *layout(*sizes))
    assert list(job.metrics(whole)) == list(range(9))
    assert_same(job, whole, hit)
    kept = sorted(path.name for path in (job.run(hit) / "checkpoints").iterdir())
    assert kept == ["step_000006", "step_000008"]
    assert (job.run(hit) / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "sizes", "knob"), [(1, (1, 1), "loss=nca"), (4, (2, 2), "schedule=cosine")]
)
def test_prm_training_that_was_hit_is_that_of_one_that_was_not(
    job: Job, rollouts: Path, ranks: int, sizes: tuple[int, int], knob: str
) -> None:
    whole, hit = f"prm_whole_{ranks}", f"prm_hit_{ranks}"
    knobs = [*of_prm(rollouts, f"--prm.{knob}", *PRM), *layout(*sizes)]
    job.start("train_prm", ranks, whole, *knobs)
    finish_twice(job, "train_prm", hit, ranks, *knobs)
    assert_same(job, whole, hit)


@pytest.mark.slow
def test_another_layout_and_a_loaded_reference_learn_the_same(job: Job, rollouts: Path) -> None:
    """TP 2 × PP 1 × DP 2 with a reference beside the PRM, against one rank with remembered ones."""
    knobs = of_prm(rollouts, *PRM)
    job.start_alone("train_prm", "remembered", *knobs, *ALONE)
    job.start("train_prm", 4, "loaded", *knobs, "--train_prm.reference=loaded", *layout(2, 1))
    one, other = job.metrics("remembered"), job.metrics("loaded")
    assert (job.run("remembered") / "reference_logprobs.pt").exists()
    assert not (job.run("loaded") / "reference_logprobs.pt").exists()
    for step in range(1, 9):
        for name in ("prm/loss", "prm/grad_norm", "prm/calibration_error"):
            assert other[step][name] == pytest.approx(one[step][name], abs=2e-4), (step, name)
    assert other[8]["held_out/loss"] == pytest.approx(one[8]["held_out/loss"], abs=2e-4)


@pytest.mark.slow
def test_a_runs_checkpoint_scores_like_its_export_and_knows_its_reference(
    job: Job, trained: Path
) -> None:
    source = job.folder / "one.jsonl"
    source.write_text(json.dumps({"prompt": "0173=", "responses": ["3,3,\\boxed{3}", "no"]}))
    export = [f"--score.prm={trained}", f"--score.reference={job.folder / 'start'}"]
    checkpoint = [f"--score.prm={job.run('taught') / 'checkpoints' / 'step_000100'}"]
    lines = []
    for name, knobs in (("of_export", export), ("of_checkpoint", checkpoint)):
        job.start_alone("score", name, f"--score.input={source}", *knobs, *ALONE)
        lines.append((job.run(name) / "scores" / "scores.jsonl").read_text())
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 2
