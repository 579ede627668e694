"""Is `run.folder` one folder on all nodes, and can all write there?

Rank 0 makes a folder with a file of random content in it. On every other node one rank reads that
file, writes one of its own and renames it, as checkpoints are; rank 0 has to see it. A folder that
only looks the same, such as every node's /tmp, is found out so.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

APPEARS_S = 5.0  # for a network file system to show another node's file
POLL_S = 0.1


class Trial:
    """The folder of the test, on any node."""

    def __init__(self, run_folder: Path, name: str) -> None:
        self.run_folder, self.name = run_folder, name
        self.path = run_folder / f".preflight_{name}"
        self._made_run_folder = False

    def open(self) -> str:
        """Make it, on rank 0; what went wrong, or nothing."""
        try:
            self._made_run_folder = not self.run_folder.exists()
            self.path.mkdir(parents=True)
            self._write("rank_0")
        except OSError as error:
            return str(error)
        return ""

    def visit(self, who: str) -> str:
        """Read rank 0's file and leave one, on another node; what went wrong, or nothing."""
        try:
            if not self._appears("rank_0", time.monotonic() + APPEARS_S, self._look_anew):
                there = "is not there" if not self.run_folder.exists() else "is another folder"
                return f"{self.run_folder} {there}: a file that rank 0 wrote is not seen in it"
            self._write(who)
        except OSError as error:
            return str(error)
        return ""

    def unseen(self, visitors: Iterable[str]) -> list[str]:
        """Whose files rank 0 does not see."""
        until = time.monotonic() + APPEARS_S
        try:
            return [who for who in visitors if not self._appears(who, until)]
        except OSError:  # it has been said
            return []

    def close(self) -> None:
        """Remove what `open` made; nothing of it matters any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._made_run_folder:
            with suppress(OSError):  # something else is in it by now
                self.run_folder.rmdir()

    def _write(self, who: str) -> None:
        draft = self.path / f"{who}.new"
        with draft.open("w") as file:
            file.write(self.name)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self.path / who)

    def _appears(self, who: str, until: float, between: Callable[[], None] = lambda: None) -> bool:
        while True:
            with suppress(FileNotFoundError):  # not yet
                return (self.path / who).read_text() == self.name
            if time.monotonic() > until:
                return False
            between()
            time.sleep(POLL_S)

    def _look_anew(self) -> None:
        """Make NFS forget that something was not there, as it may believe for half a minute.

        It does when this node changes the folder in which it looked: a file comes and goes in
        the deepest folder on the way that it sees.
        """
        seen = next(folder for folder in self.path.absolute().parents if folder.exists())
        with suppress(OSError):  # no rights there: then time has to mend it
            tempfile.NamedTemporaryFile(prefix=".preflight_", dir=seen).close()
