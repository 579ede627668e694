"""How far a tool has come: a bar on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 40  # characters


class Progress:
    """To be called with bytes done and bytes in all; other work begins a bar of its own."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream, self._bar, self._began, self._shown = stream, stream.isatty(), time.time(), -1
        self._what = ""

    def __call__(self, done: int, total: int, before: int = 0, what: str = "") -> None:
        """Show it when it has moved. `before` of those done were there when it began."""
        moved = done * (100 if self._bar else 10) // max(total, 1)
        if what != self._what:
            self._what, self._began, self._shown = what, time.time(), -1
        if moved == self._shown:
            return
        self._shown = moved
        rate = (done - before) / 1e9 / max(time.time() - self._began, 1e-3)
        text = f"{what} {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.2f} GB/s".lstrip()
        if not self._bar:
            print(text, file=self._stream, flush=True)
            return
        full = done * _WIDTH // max(total, 1)
        end = "\n" if done == total else ""
        print(
            f"\r[{'#' * full}{'.' * (_WIDTH - full)}] {text} ",
            end=end,
            file=self._stream,
            flush=True,
        )
