"""The picture of memory: heights, colours, and nothing on top of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from megatron_prime.report.memory_picture import GIB, HUES, KINDS, PhaseBar, color_of, draw_memory

PARTS = {
    "policy.weights": 10 * GIB,
    "engine.kv_cache": 20 * GIB,
    "prm.moments": GIB // 2,
    "policy.gradients": 0,
}
BARS = [
    PhaseBar("generate", PARTS, ("", 0), "12 s\nreads memory"),
    PhaseBar("update_prm", PARTS, ("prm.activations", 30 * GIB), "8 s\ncomputes"),
]


@pytest.fixture
def figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = []
    save = Figure.savefig

    def saved(self: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    draw_memory(BARS, 80 * GIB, 6 * GIB, tmp_path / "new" / "memory.png", "A run", "a step")
    assert imread(tmp_path / "new" / "memory.png").shape[0] > 500
    return found[0]


def rectangles(figure: Any) -> list[Rectangle]:
    return [bar for container in figure.axes[0].containers for bar in container]


def test_parts_are_stacked_to_their_sum(figure: Any) -> None:
    tops = {0: 0.0, 1: 0.0}
    for bar in rectangles(figure):
        place = round(bar.get_x() + bar.get_width() / 2)
        assert bar.get_y() == pytest.approx(tops[place])
        tops[place] += bar.get_height()
    assert tops == pytest.approx({0: 30.5, 1: 60.5})
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"30.5", "60.5", "weights  10.0", "activations  30.0", "KV cache  20.0"} <= {*words}
    assert not any(word.startswith("Adam moments") for word in words)  # too low for its name
    assert "device\n80 GiB\n(6 reserve)" in words


def test_the_limit_is_a_line_with_the_reserve_under_it(figure: Any) -> None:
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [80, 80]
    (band,) = (p for p in figure.axes[0].patches if p.get_alpha() == 0.09)
    assert (band.get_y(), band.get_height()) == (74, 6)


def test_labels_are_inside_their_parts_and_apart(figure: Any) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = figure.axes[0]
    words = [*axes.texts, *axes.get_xticklabels(), axes.title, *figure.legends[0].get_texts()]
    boxes = [(word, word.get_window_extent(renderer)) for word in words if word.get_text()]
    for number, (word, box) in enumerate(boxes):
        for other, second in boxes[number + 1 :]:
            assert not box.overlaps(second), f"{word.get_text()!r} on {other.get_text()!r}"
    bars = [bar.get_window_extent(renderer) for bar in rectangles(figure)]
    for word, box in boxes:
        if "  " in word.get_text():
            assert any(bar.x0 <= box.x0 and box.x1 <= bar.x1 for bar in bars)


def test_owners_are_hues_and_kinds_are_shades() -> None:
    colors = {color_of(f"{owner}.{kind}") for owner in HUES for kind in ("weights", "moments")}
    assert len(colors) == 2 * len(HUES)
    shades = [sum(color_of(f"policy.{kind}")) for kind in ("weights", "masters", "moments")]
    assert shades == sorted(shades)
    assert sum(color_of("policy.activations")) > sum(color_of("policy.gradients"))


def test_every_kind_that_is_kept_has_a_shade() -> None:
    from megatron_prime.planner.residency import ALL

    assert {name.split(".")[1] for name in ALL} <= KINDS.keys()
    assert {name.split(".")[0] for name in ALL} <= HUES.keys()
