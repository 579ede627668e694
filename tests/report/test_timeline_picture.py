from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_prime.errors import Interrupted
from megatron_prime.protocols import Phase
from megatron_prime.report import timeline as module
from megatron_prime.report.timeline import draw_timeline, drawn_timeline, read_events
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.runtime.trace import Trace, rank_file


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(folder: Path, rank: int, steps: int, late_s: float = 0.0) -> None:
    """Steps of 20 s: 12 of generation with a tail, checks and waiting, 5 of updates, 3 of nothing.

    Rank 0 moves memory for 1 s of the 12.
    """
    clock = Clock()
    timeline = Timeline(Trace(folder, rank, fresh=True), clock)
    for step in range(1, steps + 1):
        began = clock.now
        if rank == 0:
            with timeline.switching([], ["engine.weights"]):
                clock.now += 1
        with timeline.phase(Phase.GENERATE):
            timeline.generating(4)
            clock.now = began + 5 + late_s
            timeline.at_work(1)
            clock.now += 2
            timeline.generated()
            clock.now += 1
            timeline.checked()
            clock.now = began + 12
            timeline.met()
        with timeline.phase(Phase.UPDATE_POLICY):
            clock.now += 5
        clock.now += 3
        timeline.step(step)
    timeline.close()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: object, **options: object) -> None:
        saved.append(self)
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", kept)
    return saved


def boxes(figure: Figure) -> dict[str, list[tuple[float, ...]]]:
    """What the legend names, as (row, from, to, height) of each rectangle."""
    (axes,) = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    return {
        name: sorted(
            (
                int(patch.get_y()),
                round(patch.get_x(), 3),
                round(patch.get_x() + patch.get_width(), 3),
                round(patch.get_height(), 3),
            )
            for patch in container.patches
        )
        for name, container in zip(names, axes.containers, strict=True)
    }


def test_who_did_what_when(tmp_path: Path, figures: list[Figure]) -> None:
    run(tmp_path, 0, steps=1)
    run(tmp_path, 1, steps=1, late_s=2.0)
    draw_timeline(tmp_path, 2, "a run")
    (figure,) = figures
    bar = module.BAR[1]
    assert boxes(figure) == {
        "generate": [(0, 1, 12, bar), (1, 0, 12, bar)],
        "update policy": [(0, 12, 17, bar), (1, 12, 17, bar)],
        "idle: long tail": [(0, 5, 7, 0.75 * bar), (1, 7, 9, 0.75 * bar)],
        "idle: verifying": [(0, 7, 8, bar), (1, 9, 10, bar)],
        "idle: straggling": [(0, 8, 12, bar), (1, 10, 12, bar)],
        "idle: switching": [(0, 0, 1, bar)],
        "memory moves": [(0, 0, 1, module.MARK[1])],
    }
    assert imread(tmp_path / "timeline.png")[..., :3].std() > 0.05, "an empty picture"


def test_the_last_steps_of_some_ranks(tmp_path: Path, figures: list[Figure]) -> None:
    for rank in range(40):
        run(tmp_path, rank, steps=5)
    draw_timeline(tmp_path, 40, "a run")
    (axes,) = figures[0].axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert (shown[0], shown[1], shown[-1], len(shown)) == ("rank 0", "rank 2", "rank 37", 16)
    assert [text.get_text() for text in axes.texts] == ["step 3", "step 4", "step 5"]
    assert axes.get_xlim() == pytest.approx((0, 60))
    assert "a run, 16 of 40 ranks" in figures[0].get_suptitle()


@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_no_text_lies_on_another(tmp_path: Path, figures: list[Figure], ranks: int) -> None:
    for rank in range(ranks):
        run(tmp_path, rank, steps=4)
    draw_timeline(tmp_path, ranks, "runs/a_name_of_some_length")
    (figure,) = figures
    (axes,) = figure.axes
    figure.draw_without_rendering()  # it was saved with another resolution than it has now
    texts = [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes.xaxis.label]
    texts += [figure._suptitle, *figure.legends[0].get_texts()]
    spaces = {text.get_text(): text.get_window_extent() for text in texts}
    assert len(spaces) == len(texts)
    page = figure.bbox
    for space in spaces.values():
        assert page.x0 <= space.x0
        assert space.x1 <= page.x1
        assert page.y0 <= space.y0
        assert space.y1 <= page.y1
    assert [pair for pair in combinations(spaces, 2) if overlap(*map(spaces.get, pair))] == []


def overlap(one: Any, other: Any) -> bool:
    return bool(one.overlaps(other))


def test_a_torn_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run(tmp_path, 0, steps=2)
    path = rank_file(tmp_path, 0)
    whole = read_events(path)
    path.write_text(path.read_text() + '{"name":"x","ph":"X","ts":1')
    assert read_events(path) == whole
    assert list(whole.steps) == [1, 2]
    assert len([span for span in whole.spans if span.lane == "phases"]) == 4


def test_without_a_step_there_is_nothing_to_draw(tmp_path: Path) -> None:
    Trace(tmp_path, 0, fresh=True).close()
    draw_timeline(tmp_path, 1, "a run")
    assert not (tmp_path / "timeline.png").exists()


@pytest.mark.parametrize(("error", "drawn"), [(None, True), (Interrupted, True), (OSError, False)])
def test_drawn_at_the_end_unless_the_run_failed(
    tmp_path: Path, error: type[Exception] | None, drawn: bool
) -> None:
    def steps(rank: int, resume_step: int) -> None:
        ranks = SimpleNamespace(rank=rank, world_size=2, timeline=Timeline())
        with drawn_timeline(ranks, tmp_path, resume_step) as timeline:
            with timeline.phase(Phase.SCORE):
                pass
            timeline.step(resume_step + 1)
            if error:
                raise error

    for rank in (1, 0):
        for resume_step in (0, 1):
            if error:
                with pytest.raises(error):
                    steps(rank, resume_step)
            else:
                steps(rank, resume_step)
    assert (tmp_path / "timeline.png").exists() == drawn
    assert list(read_events(rank_file(tmp_path, 0)).steps) == [1, 2], "continued"
