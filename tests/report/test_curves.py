from __future__ import annotations

import json
import math

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_prime.report.curves import draw_curves, series, trailing_mean


def record(step):
    """Figures of one step; 17 has a loss that is not finite, every tenth an evaluation."""
    return {
        "step": step,
        "rollout/accuracy": 0.25 + 0.5 * (1 - math.exp(-step / 40)) + 0.05 * math.sin(9 * step),
        "rollout/response_length_mean": 20 + 0.05 * step,
        "rollout/truncation_rate": 0.0,
        "rollout/mismatch_kl": 1e-6 * (1 + step % 5),
        "prm/pair_accuracy_before": 0.6,
        "prm/loss": None if step == 17 else 0.6,
        "policy/clip_fraction": 0.003,
        "policy/approx_kl": 1e-4 * math.cos(step),
        "policy/entropy": 1.2 * math.exp(-step / 80),
        "time/generate_s": 2.0,
        "time/update_policy_s": 1.0,
        "time/step_s": 3.0,
        **({"evaluate/accuracy": step / 100} if step % 10 == 0 else {}),
    }


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw records; returns the axes by title and the picture."""
    figures = []
    save = Figure.savefig

    def saved(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)

    def draw(records):
        png = tmp_path / "deep" / "curves.png"
        draw_curves(write(tmp_path / "metrics.jsonl", records), png, "a run")
        (figure,) = figures
        return {axes.get_title(loc="left"): axes for axes in figure.axes}, imread(png)

    return draw


def test_draws_a_panel_for_everything_that_was_logged(draw):
    panels, picture = draw(
        [{"step": 0, "evaluate/accuracy": 0.2}] + [record(n) for n in range(1, 101)]
    )
    assert set(panels) == {
        "Accuracy",
        "PRM: pairs ranked as verified",
        "PRM loss",
        "Clipped tokens",
        "Policy moved by the update",
        "Policy entropy",
        "Response length",
        "Truncated responses",
        "Rollout engine against trainer",
        "Where the time goes",
    }
    assert picture.shape[0] > 1000
    assert picture.shape[1] > 1200
    for axes in panels.values():
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel()
    assert panels["Rollout engine against trainer"].get_yscale() == "log"
    assert panels["Rollout engine against trainer"].get_ylim() == (1e-6, 1e-5)
    assert panels["Truncated responses"].get_ylim() == (0, 1)


def test_long_runs_show_each_step_thin_and_the_trend_thick(draw):
    names = ("step", "rollout/accuracy", "evaluate/accuracy")
    records = [{k: v for k, v in record(n).items() if k in names} for n in range(1, 101)]
    panels, _ = draw(records)
    thin, thick, held_out = panels["Accuracy"].get_lines()
    accuracy = [r["rollout/accuracy"] for r in records]
    assert list(thin.get_ydata()) == accuracy
    assert thin.get_linewidth() < thick.get_linewidth()
    assert thick.get_ydata()[49] == pytest.approx(sum(accuracy[40:50]) / 10)
    assert list(held_out.get_xdata()) == list(range(10, 101, 10))
    assert list(held_out.get_ydata()) == [n / 100 for n in range(10, 101, 10)]


def test_legends_cover_no_data(draw):
    panels, _ = draw([record(n) for n in range(1, 101)])
    legends = {title: axes.get_legend() for title, axes in panels.items() if axes.get_legend()}
    assert set(legends) == {
        "Accuracy",
        "PRM: pairs ranked as verified",
        "PRM loss",
        "Where the time goes",
    }
    for title, legend in legends.items():
        plot, box = panels[title].get_window_extent(), legend.get_window_extent()
        assert box.y0 >= plot.y1 - 3, title
        assert box.x1 <= plot.x1 + 1, f"{title}: the legend runs into the next panel"
    assert [text.get_text() for text in legends["PRM: pairs ranked as verified"].get_texts()] == [
        "before the update",
        "chance",
    ]


def test_bars_of_a_step_stack_up_to_its_seconds(draw):
    seconds = {"time/generate_s": 2.0, "time/update_policy_s": 1.0, "time/step_s": 3.0}
    panels, _ = draw([{"step": n, **seconds} for n in range(1, 4)])
    generate, update = panels["Where the time goes"].containers
    assert [bar.get_height() for bar in generate] == [2.0, 2.0, 2.0]
    assert [(bar.get_y(), bar.get_height()) for bar in update] == [(2.0, 1.0)] * 3
    assert panels["Where the time goes"].get_ylabel() == "seconds per step"


def test_bars_of_long_runs_are_means_of_several_steps(draw):
    records = [{"step": n, "time/generate_s": float(n % 2)} for n in range(1, 601)]
    panels, _ = draw(records)
    (bars,) = panels["Where the time goes"].containers
    assert len(bars) == 60
    assert {bar.get_height() for bar in bars} == {0.5}
    assert panels["Where the time goes"].get_ylabel() == "seconds per step, mean of 10"


def test_a_fine_tuning_run_has_its_own_panel(draw):
    panels, _ = draw([{"step": n, "sft/loss": 3.0 / n, "time/step_s": 1.0} for n in range(1, 40)])
    assert set(panels) == {"Fine-tuning loss"}


def test_nothing_to_draw_is_an_error(tmp_path):
    empty = write(tmp_path / "metrics.jsonl", [])
    with pytest.raises(ValueError, match="no figures to draw"):
        draw_curves(empty, tmp_path / "curves.png", "")
    assert not (tmp_path / "curves.png").exists()


def test_series_takes_the_steps_that_have_the_metric():
    records = [
        {"step": 0},
        {"step": 1, "prm/loss": 0.5},
        {"step": 2},
        {"step": 3, "prm/loss": None},
    ]
    steps, values = series(records, "prm/loss")
    assert steps == [1, 3]
    assert values[0] == 0.5
    assert math.isnan(values[1])


def test_trailing_mean_by_hand():
    values = [1.0, 3.0, math.nan, 5.0, 10.0]
    assert trailing_mean(values, 3) == [1.0, 2.0, 2.0, 4.0, 7.5]
    assert math.isnan(trailing_mean([math.nan], 3)[0])
