from __future__ import annotations

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_prime.protocols import Phase
from megatron_prime.runtime.recorder import MetricsError, RunRecorder

METRICS = {"rollout/accuracy": 0.5, "time/step_s": 2.0, "filter/kept": 4}


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def steps(folder):
    return [json.loads(line)["step"] for line in lines(folder)]


def tensorboard(folder, name):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def run(folder, first, last, resume_step=0):
    with RunRecorder(folder, 100, rank=0, resume_step=resume_step) as recorder:
        for step in range(first, last + 1):
            recorder.log(step, {"rollout/accuracy": step / 100})


def test_writes_a_sorted_json_line_per_step_at_once(tmp_path):
    with RunRecorder(tmp_path / "new" / "run", 10, rank=0) as recorder:
        recorder.log(1, METRICS)
        assert lines(tmp_path / "new" / "run") == [
            '{"step": 1, "filter/kept": 4, "rollout/accuracy": 0.5, "time/step_s": 2.0}'
        ]
        recorder.log(2, METRICS)
        assert steps(tmp_path / "new" / "run") == [1, 2]


def test_what_is_not_finite_becomes_null(tmp_path):
    with RunRecorder(tmp_path, 10, rank=0) as recorder:
        recorder.log(1, {"prm/loss": math.nan, "policy/loss": math.inf, "policy/lr": 1e-6})
    assert lines(tmp_path) == [
        '{"step": 1, "policy/loss": null, "policy/lr": 1e-06, "prm/loss": null}'
    ]


def test_tensorboard_gets_every_figure(tmp_path):
    with RunRecorder(tmp_path, 10, rank=0) as recorder:
        recorder.log(1, METRICS)
        recorder.log(2, METRICS | {"rollout/accuracy": 0.75})
    assert tensorboard(tmp_path, "rollout/accuracy") == [(1, 0.5), (2, 0.75)]
    assert tensorboard(tmp_path, "filter/kept") == [(1, 4.0), (2, 4.0)]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    run(tmp_path, 0, 7)
    run(tmp_path, 5, 6, resume_step=4)
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert [step for step, _ in tensorboard(tmp_path, "rollout/accuracy")] == [0, 1, 2, 3, 4, 5, 6]


def test_a_torn_last_line_does_not_hinder_resuming(tmp_path):
    run(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/accu')
    run(tmp_path, 4, 4, resume_step=3)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_other_damage_is_reported_and_nothing_is_lost(tmp_path):
    damaged = '{"step": 1}\n{"stop": 2}\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with pytest.raises(MetricsError, match=r"metrics\.jsonl has a line that is no step: .*stop"):
        RunRecorder(tmp_path, 10, rank=0, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == damaged


def test_a_fresh_start_puts_the_old_file_aside(tmp_path):
    run(tmp_path, 0, 3)
    run(tmp_path, 0, 1)
    assert steps(tmp_path) == [0, 1]
    previous = (tmp_path / "metrics.previous.jsonl").read_text().splitlines()
    assert len(previous) == 4


def saved_rollouts(folder, step, resume_step=0, save_rollouts=True):
    knobs = {"resume_step": resume_step, "save_rollouts": save_rollouts}
    with RunRecorder(folder, 100, rank=0, **knobs) as recorder:
        recorder.rollouts(step, [])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_fresh_start_puts_the_rollouts_of_an_older_run_aside(tmp_path):
    saved_rollouts(tmp_path, 7)
    saved_rollouts(tmp_path, 8, resume_step=7)
    assert names(tmp_path / "rollouts") == ["step_000007.jsonl", "step_000008.jsonl"]
    saved_rollouts(tmp_path, 1, save_rollouts=False)
    assert names(tmp_path / "rollouts") == ["step_000007.jsonl", "step_000008.jsonl"]
    saved_rollouts(tmp_path, 1)
    assert names(tmp_path / "rollouts") == ["step_000001.jsonl"]
    assert names(tmp_path / "rollouts.previous") == ["step_000007.jsonl", "step_000008.jsonl"]
    saved_rollouts(tmp_path, 2)
    assert names(tmp_path / "rollouts.previous") == ["step_000001.jsonl"]


def test_a_step_is_logged_once(tmp_path):
    with RunRecorder(tmp_path, 10, rank=0) as recorder:
        recorder.log(0, METRICS)
        recorder.log(1, METRICS)
        with pytest.raises(MetricsError, match="step 1 logged after step 1"):
            recorder.log(1, METRICS)
    with (
        RunRecorder(tmp_path, 10, rank=0, resume_step=1) as resumed,
        pytest.raises(MetricsError, match="step 1 logged after step 1"),
    ):
        resumed.log(1, METRICS)
    assert steps(tmp_path) == [0, 1]


def test_nothing_to_log_writes_nothing(tmp_path):
    with RunRecorder(tmp_path, 10, rank=0) as recorder:
        recorder.log(0, {})
    assert lines(tmp_path) == []


@pytest.mark.parametrize("name", ["actor/loss", "loss", "Rollout/accuracy", ""])
@pytest.mark.parametrize("rank", [0, 1])
def test_unknown_stages_are_refused_on_every_rank(tmp_path, name, rank):
    with (
        RunRecorder(tmp_path, 10, rank=rank) as recorder,
        pytest.raises(MetricsError, match="wanted names like rollout/accuracy"),
    ):
        recorder.log(1, {**METRICS, name: 1.0})


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with RunRecorder(tmp_path, 10, rank=3) as recorder:
        recorder.phase(Phase.GENERATE)
        recorder.progress("prompts", 1, 2)
        recorder.log(1, METRICS)
        recorder.summary(tmp_path / "curves.png", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_prints_a_line_per_step_and_the_paths_at_the_end(tmp_path, capsys):
    with RunRecorder(tmp_path, 10, rank=0) as recorder:
        recorder.phase(Phase.GENERATE)
        recorder.progress("prompts", 1, 2)
        recorder.log(1, METRICS)
        recorder.log(10, METRICS)
        recorder.summary(tmp_path / "curves.png", tmp_path / "hf")
    first, last, *paths = capsys.readouterr().out.splitlines()
    assert first.startswith("step  1/10  accuracy 0.500  2.0 s  0:00:0")
    assert last == "step 10/10  accuracy 0.500  2.0 s"
    assert [line.split()[-1] for line in paths] == [
        str(tmp_path / name) for name in ("metrics.jsonl", "curves.png", "hf", "tensorboard")
    ]


def test_a_marked_step_is_called_out(tmp_path, capsys):
    marked = {**METRICS, "rollout/mismatch_kl": 0.07, "rollout/mismatch_alarm": 1.0}
    with RunRecorder(tmp_path, 10, rank=0, mismatch_alarm=0.05) as recorder:
        recorder.log(1, {**marked, "rollout/mismatch_alarm": 0.0})
        recorder.log(2, marked)
    first, second, warning = capsys.readouterr().out.splitlines()
    assert first.startswith("step  1/10")
    assert second.startswith("step  2/10")
    assert warning.startswith("warning: step 2: rollout/mismatch_kl is 0.07 nats")
    assert "rollout.mismatch_alarm = 0.05" in warning
    with RunRecorder(tmp_path / "other", 10, rank=1, mismatch_alarm=0.05) as recorder:
        recorder.log(1, marked)
    assert capsys.readouterr().out == ""


def test_every_rank_s_timeline_hears_of_the_steps(tmp_path):
    for rank in (0, 1):
        heard = []
        with RunRecorder(tmp_path, 10, rank=rank, on_step=heard.append) as recorder:
            recorder.log(0, {})
            recorder.log(1, METRICS)
        assert heard == [0, 1]
