"""How often the PRM's lowest step is the first wrong one: what credit assignment would need.

A run saves its rollouts and, every so often, a checkpoint. The PRM of the checkpoint after step k
is asked about the wrong answers of step k + 1, which it has not learnt from: the rewards of the
tokens of each step are added, and the lowest step is compared with the first wrong one
(`task.first_wrong_step`). Beside it, what guessing a step would give.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import task
import torch
from runs import HERE, ROOT, Place, Run
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = tuple[tuple[int, ...], dict[str, Any]]  # of a rollout file: prompt_ids, rollout


@dataclass(frozen=True, slots=True)
class Found:
    """Of the wrong answers of a step."""

    step: int  # rollout step of the answers
    answers: int
    lowest_is_first: float  # share in which the PRM's lowest step is the first wrong one
    chance: float  # the same of a step taken at random
    right_above_wrong: float  # how often a right step's reward is above a wrong one's


def localisation(place: Place, run: Run) -> list[Found]:
    """At each checkpoint that a next step's rollouts follow; empty without a PRM that learns."""
    if not run.config.uses_prm or run.config.prm.forward == "frozen":
        return []
    kept = run.folder / "localisation.json"
    if not kept.exists():
        found = [
            _at(place, run, folder) for folder in sorted(run.folder.glob("checkpoints/step_*"))
        ]
        rows = [[f.step, f.answers, f.lowest_is_first, f.chance, f.right_above_wrong]
                for f in found if f is not None]  # fmt: skip
        kept.write_text(json.dumps(rows))
    return [Found(*row) for row in json.loads(kept.read_text())]


def _at(place: Place, run: Run, checkpoint: Path) -> Found | None:
    step = int(re.findall(r"\d+", checkpoint.name)[-1]) + 1
    rollouts = run.folder / "rollouts" / f"step_{step:06d}.jsonl"
    if not rollouts.exists():
        return None
    hf = run.folder / "prm" / checkpoint.name
    if not (hf / "config.json").exists():
        convert(checkpoint, hf)
    groups = [json.loads(line) for line in rollouts.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(place.start)
    settings = task.Task(**json.loads((place.out / "data" / "task.json").read_text()))
    answers = [
        (tuple(group["prompt"]["token_ids"]), rollout)
        for group in groups
        for rollout, outcome in zip(group["rollouts"], group["outcome_rewards"], strict=True)
        if outcome < 1
    ]
    rewards = log_ratios(hf, place.start, answers)
    return summary(step, settings, [tokenizer.decode(p) for p, _ in answers], answers, rewards)


def summary(
    step: int,
    settings: task.Task,
    prompts: Sequence[str],
    answers: Sequence[Answer],
    rewards: Sequence[Sequence[float]],
) -> Found:
    """Compare lowest and first wrong steps."""
    machines = task.machines_of(settings)
    hits = chance = count = 0.0
    right: list[float] = []
    wrong: list[float] = []
    for prompt, (_, rollout), tokens in zip(prompts, answers, rewards, strict=True):
        problem = task.Problem(prompt[:-2], int(prompt[-2]))
        first = task.first_wrong_step(problem, str(rollout["text"]), settings, machines)
        if first is None or first >= settings.steps:
            continue  # right by the steps, or not in the form
        steps = step_rewards(tokens, settings.steps)
        hits += min(range(len(steps)), key=steps.__getitem__) == first
        chance += 1 / len(steps)
        count += 1
        wrong.append(steps[first])
        right += steps[:first]
    above = _area(right, wrong)
    share = hits / count if count else math.nan
    return Found(step, int(count), share, chance / count if count else math.nan, above)


def step_rewards(tokens: Sequence[float], steps: int) -> list[float]:
    """The rewards of the tokens of each step added up; the box is no step."""
    return [sum(tokens[3 * i : 3 * i + 3]) for i in range(min(steps, math.ceil(len(tokens) / 3)))]


def _area(right: Sequence[float], wrong: Sequence[float]) -> float:
    """How often one of `right` is above one of `wrong`; equal ones count half."""
    if not right or not wrong:
        return math.nan
    high, low = torch.tensor(right), torch.tensor(wrong)[:, None]
    return float(((high > low).float() + 0.5 * (high == low)).mean())


@torch.inference_mode()
def log_ratios(prm: Path, reference: Path, answers: Sequence[Answer]) -> list[list[float]]:
    """log(prm / reference) of each response token."""
    sequences = [torch.tensor([*prompt, *rollout["response_ids"]]) for prompt, rollout in answers]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    both = []
    for folder in (prm, reference):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits = model(padded[:, :-1]).logits.log_softmax(-1)
        both.append(logits.gather(-1, padded[:, 1:, None])[..., 0])
    ratio = both[0] - both[1]
    return [
        ratio[row, len(prompt) - 1 : len(sequence) - 1].tolist()
        for row, ((prompt, _), sequence) in enumerate(zip(answers, sequences, strict=True))
    ]


def convert(checkpoint: Path, hf: Path) -> None:
    """The PRM of a run's checkpoint as a Hugging Face folder."""
    tool = [sys.executable, str(HERE.parents[1] / "tools" / "convert_megatron_to_hf.py")]
    words = [*tool, "--checkpoint", str(checkpoint), "--model", "prm", "--out", str(hf)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
