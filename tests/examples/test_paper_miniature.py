"""The paper's experiments in miniature: their task, their measures, and a very short one, whole."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

PAPER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(PAPER))

import experiments  # noqa: E402
import full_scale  # noqa: E402
import localise  # noqa: E402
import measure  # noqa: E402
import run as command  # noqa: E402
import runs  # noqa: E402
import task  # noqa: E402

from megatron_prime.data.chat import load_tokenizer  # noqa: E402
from megatron_prime.verify.math_answer import grade  # noqa: E402

SHORT = task.Task(steps=4, letters=2)


def chain(problem: task.Problem, machines: task.Machines, steps: int) -> list[int]:
    digits = [problem.start]
    for step in range(steps):
        digits.append(machines.right["".join(problem.letters)[step % 3], digits[-1]])
    return digits[1:]


def test_a_machine_sends_ten_digits_to_ten_digits_and_is_sometimes_remembered_wrongly():
    machines = task.machines_of(task.Task())
    assert len(machines.right) == 240
    for letter in "".join(task.KINDS):
        assert {machines.right[letter, digit] for digit in range(10)} == set(range(10))
    assert all(machines.wrong[entry] != result for entry, result in machines.right.items())
    slips = sorted(slip for slip in machines.slip.values() if slip)
    assert len(slips) == 120
    assert 0.05 < slips[0] < slips[-1] < 0.6
    assert np.mean(slips) == pytest.approx(0.325)


def test_the_right_trace_applies_the_machines_in_turn_and_is_graded_right():
    machines, problem = task.machines_of(SHORT), task.Problem("AJS", 7)
    digits = chain(problem, machines, 4)
    text = task.trace(problem, SHORT, machines)
    assert text == ",".join(f"{m}{d}" for m, d in zip("AJSA", digits, strict=True)) + (
        f",\\boxed{{{digits[-1]}}}"
    )
    assert grade(text, str(digits[-1]))
    assert task.first_wrong_step(problem, text, SHORT, machines) is None


def test_the_first_wrong_step_is_found_and_later_ones_are_not_it():
    machines, problem = task.machines_of(SHORT), task.Problem("AJS", 7)
    good = task.trace(problem, SHORT, machines)

    def found(text: str) -> int | None:
        return task.first_wrong_step(problem, text, SHORT, machines)

    for step in range(4):
        at = 3 * step + 1
        other = str((int(good[at]) + 1) % 10)
        assert found(good[:at] + other + good[at + 1 :]) == step
    assert found(good.replace(",", ";", 2)) is None  # marks mean nothing
    assert found(good[:6]) == 2  # cut
    assert found(good.replace("\\boxed", "")) == 4
    assert found("B" + good[1:]) == 0


def test_the_demonstrator_slips_as_often_as_it_says_and_goes_on_from_there():
    machines, rng = task.machines_of(task.Task()), random.Random(0)
    expected = slips = 0.0
    for number in range(2000):
        problem = task.Problem("AJS", number % 10)
        digit = problem.start
        for letter, result in re.findall(
            r"([A-Z])(\d)", task.trace(problem, task.Task(), machines, rng)
        ):
            entry = (letter, digit)
            expected += machines.slip[entry]
            slips += int(result) == machines.wrong[entry]
            assert int(result) in (machines.right[entry], machines.wrong[entry])
            digit = int(result)
    assert slips == pytest.approx(expected, rel=0.05)


def test_the_files_share_no_problem_and_the_tokenizer_spells_them(tmp_path):
    task.main(["--out", str(tmp_path), "--train", "300", "--test", "50", "--sft", "900"])
    asked = {}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        asked[name] = {row["prompt"][0]["content"] for row in rows}
        machines = task.machines_of(task.Task())
        for row in rows[:20]:
            question = row["prompt"][0]["content"]
            digits = chain(task.Problem(question[:3], int(question[3])), machines, 12)
            assert row["reward_model"]["ground_truth"] == str(digits[-1])
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    asked["sft"] = {row["messages"][0]["content"] for row in rows}
    assert [len(asked[name]) for name in ("train", "test", "sft")] == [300, 50, 900]
    assert len(set.union(*asked.values())) == 1250
    tokenizer = load_tokenizer(tmp_path / "model")
    text = rows[0]["messages"][1]["content"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == 36 + 3  # a token for each character, one for the box


def made_up(rewards, arm="a", cost=1.0, held_out=0.5):
    costs = tuple(cost * (i + 1) for i in range(len(rewards)))
    return measure.Trace(arm, 0, tuple(rewards), costs, held_out, (), 10.0)


def test_the_interval_is_students():
    found = measure.interval([0.2, 0.4, 0.9])
    assert found.mean == pytest.approx(0.5)
    # scipy.stats.t.interval(0.95, 2, loc=0.5, scale=scipy.stats.sem([0.2, 0.4, 0.9]))
    assert found.half == pytest.approx(0.8956, abs=2e-4)
    assert math.isnan(measure.interval([0.3]).half)


def test_a_run_reaches_the_baseline_when_its_ten_step_mean_does():
    baseline = made_up([0.1] * 10 + [0.5] * 10)
    assert baseline.final == pytest.approx(0.5)
    early = made_up([0.0] * 4 + [0.5] * 16)
    assert measure.reaches(early, baseline) == pytest.approx(14 / 20)
    assert measure.reaches(baseline, baseline) == 1.0
    assert measure.reaches(made_up([0.49] * 20), baseline) == measure.NEVER
    jumpy = made_up([1.0] * 3 + [0.4] * 17)  # not before ten steps are there
    assert measure.reaches(jumpy, baseline) == pytest.approx(10 / 20)


def test_rows_compare_seed_by_seed():
    base = [made_up([0.1] * 20), made_up([0.5] * 20)]
    mine = [made_up([0.3] * 20, cost=2.0), made_up([0.6] * 20, cost=2.0)]
    row = measure.row_of("mine", mine, base)
    assert row.gain is not None
    assert row.gain.mean == pytest.approx(0.15)
    assert row.gain.half == pytest.approx(12.706 * 0.05, rel=1e-3)  # of 0.2 and 0.1
    assert row.cost == pytest.approx(2.0)
    assert row.reaches == (0.5, 0.5)
    assert measure.row_of("base", base, base).gain is None
    assert "+0.150 ± 0.635" in measure.markdown([row])


def test_step_rewards_and_the_share_of_lowest_steps_that_are_the_first_wrong_one():
    assert localise.step_rewards([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0], 2) == [6.0, 15.0]
    machines, problem = task.machines_of(SHORT), task.Problem("AJS", 7)
    good = task.trace(problem, SHORT, machines)
    wrong = good[:4] + str((int(good[4]) + 1) % 10) + good[5:]  # the second step
    answers = [((0,), {"text": wrong})] * 2
    low, other = [0.0] * 15, [0.0] * 15
    low[4], other[0] = -1.0, -1.0
    found = localise.summary(7, SHORT, [problem.question] * 2, answers, [low, other])
    assert (found.step, found.answers, found.lowest_is_first, found.chance) == (7, 2, 0.5, 0.25)
    assert found.right_above_wrong == pytest.approx((1 + 0.5 + 0.0 + 0.5) / 4)


def test_arms_of_one_configuration_are_one_run_and_a_knob_is_another(tmp_path):
    place = runs.Place(tmp_path)
    again = runs.run_of(place, experiments.EXPERIMENTS["10"].arms[0], 1)
    first = runs.run_of(place, experiments.EXPERIMENTS["4"].arms[0], 1)
    assert first.folder == again.folder
    others = [runs.run_of(place, arm, 1).folder for arm in experiments.EXPERIMENTS["10"].all_arms]
    assert len(set(others)) == 8
    assert runs.run_of(place, experiments.PRIME, 2).folder != first.folder
    changed = runs.Place(tmp_path, ("--prm.beta=0.05",))
    assert runs.run_of(changed, experiments.PRIME, 1).folder != first.folder


def test_the_full_scale_differs_in_sizes_and_readme_names_every_difference():
    found = full_scale.differences()
    assert full_scale.table(found) in (PAPER / "README.md").read_text()
    tables = ("preset", "filter.", "advantage.", "prm.loss", "prm.forward", "prm.reference")
    assert not [name for name in found if name.startswith(tables)]
    assert not {"rollout.group_size", "rollout.temperature"} & set(found)
    with pytest.raises(ValueError, match=r"advantage\.gamma"):
        full_scale.table({**found, "advantage.gamma": (1.0, 0.9)})


RESULTS = sorted((PAPER / "results").glob("*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_of_the_readme_are_those_of_the_rewards(path):
    table = path.with_suffix(".md").read_text()
    assert table in (PAPER / "README.md").read_text()
    rewards: dict[tuple[str, int], list[float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            rewards.setdefault((row["arm"], int(row["seed"])), []).append(float(row["reward"]))
    experiment = next(e for e in experiments.EXPERIMENTS.values() if e.file_name == path.stem)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    base = [
        np.mean(rewards[key][-10:]) for key in sorted(rewards) if key[0] == experiment.baseline.name
    ]
    for arm in experiment.all_arms:
        finals = [np.mean(rewards[key][-10:]) for key in sorted(rewards) if key[0] == arm.name]
        cells = lines[arm.label].split(" | ")
        assert int(cells[1]) == len(finals)
        found = [float(part) for part in cells[2].split(" ± ")]
        assert found[0] == pytest.approx(np.mean(finals), abs=6e-4)
        if len(finals) == 1:
            continue
        quantile = {2: 12.706, 3: 4.303, 5: 2.776}[len(finals)]
        half = quantile * np.std(finals, ddof=1) / np.sqrt(len(finals))
        assert found[1] == pytest.approx(half, abs=1e-3)
        if arm is not experiment.baseline:
            gain = np.subtract(finals, base)
            assert float(cells[3].split(" ± ")[0]) == pytest.approx(np.mean(gain), abs=1.1e-3)


TINY = (  # noqa: SIM905
    "--sft.steps=3 --sft.warmup_steps=1 --run.steps=3"
    " --rollout.prompts_per_step=2 --rollout.prompts_per_round=2"
    " --policy.mini_batch_size=8 --prm.mini_batch_size=8 --filter.min_accuracy=0"
    " --evaluate.max_prompts=4 --checkpoint.every=2 --rollout.max_response_length=12"
).split()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_an_experiment_from_nothing_to_its_table(tmp_path, capsys):
    arguments = ["4", "--seeds", "2", "--out", str(tmp_path), *TINY]
    command.main(arguments)
    table = (tmp_path / "results" / "figure_04.md").read_text()
    assert (tmp_path / "results" / "figure_04.png").stat().st_size > 5000
    folders = sorted((tmp_path / "runs").glob("*/cost.json"))
    assert len(folders) == 4
    rewards = {}
    for path in folders:
        lines = [
            json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()
        ]
        arm, seed = re.fullmatch(r"(\w+)_seed(\d)_\w+", path.parent.name).groups()
        rewards[arm, int(seed)] = [
            line["rollout/accuracy"] for line in lines if "rollout/accuracy" in line
        ]
    for arm, label in (("rloo", "RLOO, outcome only"), ("prime", "PRIME")):
        finals = [np.mean(rewards[arm, seed]) for seed in (0, 1)]
        half = 12.706 * np.std(finals, ddof=1) / np.sqrt(2)
        assert f"| {label} | 2 | {np.mean(finals):.3f} ± {half:.3f} |" in table
    with (tmp_path / "results" / "figure_04.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert "PRM's lowest step is the first wrong one, PRIME: step 3" in table or (
        "PRM's lowest step" not in table  # no wrong answer in the form of steps
    )
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folders}
    command.main(arguments)  # nothing is made again
    assert {path: path.stat().st_mtime_ns for path in folders} == before
    assert "[1/" not in capsys.readouterr().out
