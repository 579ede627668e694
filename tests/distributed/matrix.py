"""Which models meet which layouts: all of them under --full, and some of each soon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from layouts import LAYOUTS


def in_turn(
    names: Sequence[str], layouts: Iterable[str] = LAYOUTS, every: int = 3
) -> list[tuple[str, str]]:
    """Models with layouts: to each layout every third model, another one for the next."""
    return [
        (name, layout)
        for at, layout in enumerate(layouts)
        for number, name in enumerate(names)
        if (number + at) % every == 0
    ]


def cases(
    names: Sequence[str], soon: Iterable[tuple[str, str]], layouts: Iterable[str]
) -> list[Any]:
    """All models in all layouts as parameters of tests; what is not among `soon` is slow."""
    chosen = set(soon)
    return [
        pytest.param(
            (name, layout),
            id=f"{name}-{layout}",
            marks=() if (name, layout) in chosen else pytest.mark.slow,
        )
        for layout in layouts
        for name in names
    ]


def selected(request: pytest.FixtureRequest) -> list[Any]:
    """The values of the parameter `case` of those tests of this file that will run."""
    items = [item for item in request.session.items if item.path == request.path]
    values = [item.callspec.params.get("case") for item in items if hasattr(item, "callspec")]
    return [value for value in dict.fromkeys(values) if value is not None]
