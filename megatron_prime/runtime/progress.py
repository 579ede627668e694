"""How far a tool has come: a bar on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 40  # characters


class Progress:
    """To be called with bytes done and bytes in all."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream, self._bar, self._began, self._shown = stream, stream.isatty(), time.time(), -1

    def __call__(self, done: int, total: int) -> None:
        """Show it when it has moved."""
        moved = done * (100 if self._bar else 10) // max(total, 1)
        if moved == self._shown:
            return
        self._shown = moved
        rate = done / 1e9 / max(time.time() - self._began, 1e-3)
        text = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.2f} GB/s"
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
