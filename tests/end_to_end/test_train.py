"""Training by the real command: what a run leaves, in every layout, with each kind of reward."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job import ROOT, Job, layout, reproducible

from megatron_prime.config_file import load
from megatron_prime.protocols import Phase
from megatron_prime.report.timeline import Span, read_events
from megatron_prime.runtime.trace import rank_file

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

STEPS, RANKS = 6, 4
# Before the PRM's first update it equals the reference, and its order of two answers is rounding.
LEFT_TO_ROUNDING = {"prm/pair_accuracy_before"}


def documented() -> Iterator[str]:
    """The names in the table of docs/metrics.md; `_max` after `a/b_mean` stands for `a/b_max`."""
    for row in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        first = ""
        for name in re.findall(r"`([^`]+)`", row.partition(" | ")[0]) if row[:1] == "|" else []:
            if not name.startswith("_"):
                first = name
            yield name if name == first else first.rpartition("_")[0] + name


def seen_elsewhere(name: str) -> bool:
    """Of overflows, skipped NaNs, weights and KL, in test_fp16.py and test_training.py; of servers,
    in tests/sglang/test_run.py; of sets, in test_benchmarks.py; of stages, in test_stages.py; of a
    critic and of masked responses, in test_ppo.py."""
    of_servers = ("/server_restarts", "/repeated_syncs", "/continued_tokens")
    rare = ("/ref_kl", "/loss_scale", "/skipped_steps", "/not_finite_steps")
    rare += ("prm/epoch", "policy/masked")
    elsewhere = ("eval/", "held_out/", "critic/")
    return "/importance" in name or name.startswith(elsewhere) or name.endswith(rare + of_servers)


def test_fine_tuning_logs_what_is_documented_and_learns(job: Job) -> None:
    steps = job.metrics("sft")
    assert list(steps) == list(range(1, 61))
    names = {name for name in documented() if name.startswith("sft/") and not seen_elsewhere(name)}
    assert set(steps[60]) == names | {"time/step_s"}
    assert steps[60]["sft/loss"] < 0.2 * steps[1]["sft/loss"]
    assert steps[5]["sft/lr"] == pytest.approx(0.01), "the peak, after five steps of warm-up"


def test_every_documented_figure_is_logged_and_every_figure_documented(job: Job, full: str) -> None:
    steps = job.metrics(full)
    assert list(steps) == list(range(STEPS + 1))
    assert set(steps[0]) > {"evaluate/accuracy"}
    assert [step for step in steps if "evaluate/accuracy" in steps[step]] == [0, 3, 6]
    found = set[str]().union(*steps.values())
    phases = {f"time/{phase.value}_s" for phase in Phase} | {"time/step_s", "time/switch_s"}
    phases |= {f"memory/{phase.value}_device_gib" for phase in Phase}
    names = {name for name in documented() if not (name.startswith("sft/") or seen_elsewhere(name))}
    only_on_gpus = {"memory/device_peak_gib", "memory/device_used_gib", "prm/fp8_logprob_error"}
    of_phases = {"time/<phase>_s", "time/step_s", "memory/<phase>_device_gib"}
    assert found - phases == names - only_on_gpus - of_phases
    for step, record in steps.items():
        assert all(math.isfinite(value) for value in record.values()), (step, record)


def test_the_figures_fit_together(job: Job, full: str) -> None:
    for record in list(job.metrics(full).values())[1:]:
        assert record["rollout/mismatch_max"] < 1e-4, "the engine samples with the policy's weights"
        assert record["filter/kept"] == 8
        assert record["filter/generated"] == 12 * record["rollout/rounds"]
        assert 0.2 <= record["filter/accuracy"] <= 0.8
        assert record["verify/failures"] == 0
        assert record["rollout/mismatch_alarm"] == record["rollout/aborted"] == 0
        assert record["policy/advantage_mean"] == pytest.approx(0, abs=1e-6)
        assert record["policy/advantage_std"] == pytest.approx(1, abs=1e-3)
        seconds = [
            value
            for name, value in record.items()
            if re.fullmatch(r"time/(?!idle_|busy_|step_)[a-z_]+_s", name)
        ]
        assert record["time/step_s"] == pytest.approx(sum(seconds))


def test_the_time_of_generation_is_told_apart_by_cause(job: Job, full: str) -> None:
    """What each rank's trace says of its rounds: parts that fill them, and make up the metrics."""
    parts = ("busy", "long_tail", "verifying", "straggling")
    rounds: list[dict[int, list[dict[str, float]]]] = []
    for rank in range(RANKS):
        path = rank_file(job.run(full), rank)
        events = read_events(path)
        phases = [span for span in events.spans if span.name == "generate"]
        assert len(phases) == STEPS
        rounds.append({step: [] for step in range(1, STEPS + 1)})
        for line in path.read_text().splitlines():
            if '"cat":"rollouts"' not in line:
                continue
            event = json.loads(line.rstrip(","))
            began, seconds = event["ts"] / 1e6, event["args"]
            inside = [n for n, p in enumerate(phases, 1) if p.start <= began <= p.end]
            if not inside:  # of an evaluation
                continue
            (step,) = inside
            assert min(seconds.values()) >= 0
            assert began + sum(seconds.values()) <= phases[step - 1].end + 1e-3
            worked = event["dur"] / 1e6
            assert seconds["busy"] + seconds["long_tail"] == pytest.approx(worked, abs=1e-5)
            rounds[rank][step].append(seconds)
        accounted = sum(sum(s.values()) for found in rounds[rank].values() for s in found)
        assert accounted > 0.5 * sum(map(length, phases)), "most of the phase is in some account"
    for step, record in list(job.metrics(full).items())[1:]:
        assert {len(found[step]) for found in rounds} == {record["rollout/rounds"]}
        for part in parts:
            name = "time/busy_generating_s" if part == "busy" else f"time/idle_{part}_s"
            sums = [sum(seconds[part] for seconds in found[step]) for found in rounds]
            assert record[name] == pytest.approx(sum(sums) / RANKS, abs=1e-6)


def length(span: Span) -> float:
    return span.end - span.start


def test_a_run_leaves_everything_to_look_at(job: Job, full: str) -> None:
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = job.run(full)
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"], "checkpoint.keep is 2"
    picture = imread(folder / "curves.png")
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05, "an empty picture"
    assert imread(folder / "timeline.png")[..., :3].std() > 0.05, "an empty picture"
    assert len(list((folder / "timeline").iterdir())) == RANKS
    assert not (folder / "stuck").exists()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    curve = {event.step: event.value for event in events.Scalars("rollout/accuracy")}
    steps = job.metrics(full)
    assert curve == {
        step: pytest.approx(steps[step]["rollout/accuracy"]) for step in range(1, STEPS + 1)
    }
    assert load(folder / "config.toml", []) == job.config(full)
    assert (folder / "starts.jsonl").read_text().count("\n") == 1


def assert_same_first_step(job: Job, full: str, other: str, all_figures: bool) -> None:
    """The rollouts are the same in every layout, what is computed from them nearly so."""
    expected, found = job.metrics(full)[1], reproducible(job.metrics(other)[1])
    for name in ("rollout/accuracy", "rollout/tokens", "filter/accuracy", "filter/generated"):
        assert found[name] == expected[name], name
    assert found["prm/loss"] == pytest.approx(expected["prm/loss"], abs=1e-4)
    if all_figures:
        common = (found.keys() & expected.keys()) - LEFT_TO_ROUNDING
        assert {n.partition("/")[0] for n in common} >= {"policy", "prm", "rollout", "filter"}
        for name in sorted(common):
            assert found[name] == pytest.approx(expected[name], abs=1e-4, rel=1e-4), name


def test_data_parallel_ranks_take_the_same_step(job: Job, full: str) -> None:
    """TP 1 × PP 1 × DP 2 against TP 2 × PP 2, in all figures."""
    job.start("train", 2, "dp2", "--run.steps=1", *layout(tp=1, pp=1))
    assert_same_first_step(job, full, "dp2", all_figures=True)


def test_rewards_from_before_the_prm_update(job: Job, full: str) -> None:
    """`single_strict` in step 1: the PRM still is the reference, so all rewards are 0."""
    knobs = ["--prm.forward=single_strict", "--run.steps=2", *layout(tp=2, pp=1)]
    job.start("train", 2, "strict", *knobs)
    assert_same_first_step(job, full, "strict", all_figures=False)
    steps = job.metrics("strict")
    assert steps[1]["prm/process_return_abs_max"] < 1e-5
    assert steps[2]["prm/process_return_abs_max"] > 1e-3


def test_rewards_from_after_the_prm_update(job: Job, full: str) -> None:
    """`double`, by one process without a launcher."""
    knobs = ["--prm.forward=double", "--run.steps=2", *layout(tp=1, pp=1)]
    job.start_alone("train", "double", *knobs)
    assert_same_first_step(job, full, "double", all_figures=False)
    single, double = job.metrics(full)[1], job.metrics("double")[1]
    assert double["prm/pair_accuracy_after"] == pytest.approx(single["prm/pair_accuracy_after"])
    grown = double["prm/process_return_abs_max"] / single["prm/process_return_abs_max"]
    assert grown > 1.1, "both mini-batches have taught it, not only the first"


def test_another_estimator_with_rewards_of_steps_and_a_tie_to_the_reference(
    job: Job, full: str
) -> None:
    """GRPO; steps end with the commas of `3,3,\\boxed{3}`, read by the job's own tokenizer."""
    knobs = [
        "--advantage.estimator=grpo",
        "--advantage.granularity=step",
        "--advantage.step_separator=,",
        "--policy.loss.clip_high=0.28",
        "--policy.loss.dual_clip=3.0",
        "--policy.loss.kl_coefficient=0.1",
        "--filter.zero_variance=drop",
        "--run.steps=2",
    ]
    job.start_alone("train", "grpo", *knobs, *layout(tp=1, pp=1))
    assert_same_first_step(job, full, "grpo", all_figures=False)
    steps, plain = job.metrics("grpo"), job.metrics(full)
    same = ("prm/process_return_abs_max", "policy/outcome_return_mean")
    for name in same:
        assert steps[1][name] == pytest.approx(plain[1][name], abs=1e-4), name
    assert steps[1]["policy/advantage_std"] == pytest.approx(1, abs=1e-3)
    assert steps[1]["policy/grad_norm"] != pytest.approx(plain[1]["policy/grad_norm"], rel=1e-2)
    assert 0 <= steps[1]["policy/ref_kl"] < steps[2]["policy/ref_kl"], "it starts at the reference"
    assert "policy/ref_kl" not in plain[1]


def test_outcome_only_needs_no_prm(job: Job, full: str) -> None:
    knobs = ["--advantage.process_weight=0", "--run.steps=2", *layout(tp=1, pp=1)]
    job.start_alone("train", "outcome_only", *knobs)
    steps = job.metrics("outcome_only")
    assert list(steps) == [0, 1, 2]
    assert not [name for record in steps.values() for name in record if name.startswith("prm/")]
    assert steps[1]["rollout/accuracy"] == job.metrics(full)[1]["rollout/accuracy"]
    assert steps[1]["policy/grad_norm"] > 0
    (checkpoint,) = (job.run("outcome_only") / "checkpoints").iterdir()
    held = sorted(path.name for path in checkpoint.iterdir())
    assert held == ["manifest.json", "policy", "rng", "run.json"]


def test_training_changes_the_exported_weights_and_keeps_their_form(job: Job, full: str) -> None:
    start, trained = tensors(job.config(full).model.hf), tensors(job.run(full) / "hf")
    assert {n: (t.shape, t.dtype) for n, t in start.items()} == {
        n: (t.shape, t.dtype) for n, t in trained.items()
    }
    largest = max(float((trained[name] - start[name]).abs().max()) for name in start)
    assert 1e-3 < largest < 0.1, "twelve optimizer steps of 1e-3"


def tensors(hf: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: v for path in hf.glob("*.safetensors") for k, v in load_file(path).items()}
