"""A rank's events on disk: `timeline/rank_00003.json` in the run folder, for Perfetto.

The format is Chrome's trace, a JSON array with an event per line. Its closing bracket may be
missing, so a file is only ever appended to and is whole after a crash but for its last line, which
the next start cuts off. Times are microseconds of the wall clock: ranks line up, and so do the
parts of a run that was continued.

A file of MOST_BYTES becomes `rank_00003.previous.json`, in place of the one before, and a new one
begins: what a rank keeps is bounded, and it is the end of the run that is kept.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import IO

MOST_BYTES = 4 * 2**20  # some 30,000 events
LANES = ("phases", "moves", "rollouts", "checks", "idle")


class Trace:
    """Writes a rank's events; not to be used by two threads at once."""

    def __init__(self, folder: Path, rank: int, fresh: bool) -> None:
        """`folder`: of the run. `fresh`: an older run's events go; else they are continued."""
        self.path = rank_file(folder, rank)
        self._older = self.path.with_suffix(".previous.json")
        self._rank = rank
        # Spans are measured by a clock that is never set; this is how far it is from the wall's.
        self._offset = time.time() - time.perf_counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
            self._older.unlink(missing_ok=True)
        elif self.path.exists():
            cut_torn_line(self.path)
        self._file = self._open()

    def span(self, lane: str, name: str, start: float, end: float, **notes: object) -> None:
        """Something that took from `start` to `end`, by time.perf_counter."""
        length = max(0, round((end - start) * 1e6))
        more = f',"args":{json.dumps(notes)}' if notes else ""
        self._write(name, "X", LANES.index(lane), start, f',"cat":"{lane}","dur":{length}{more}')

    def level(self, name: str, value: float, at: float) -> None:
        """A quantity that has a new value."""
        self._write(name, "C", 0, at, f',"args":{{"{name}":{value:g}}}')

    def step(self, number: int, at: float) -> None:
        """The end of a step."""
        self._write(f"step {number}", "i", 0, at, f',"s":"p","args":{{"step":{number}}}')

    def flush(self) -> None:
        """Hand to the system what was written, so that it survives this process."""
        self._file.flush()
        if self._file.tell() >= MOST_BYTES:
            self._file.close()
            self.path.replace(self._older)
            self._file = self._open()

    def close(self) -> None:
        """Write what is left."""
        self._file.close()

    def _write(self, name: str, kind: str, lane: int, at: float, more: str) -> None:
        when = round((at + self._offset) * 1e6)
        self._file.write(
            f'{{"name":{json.dumps(name)},"ph":"{kind}","ts":{when},"pid":{self._rank},'
            f'"tid":{lane}{more}}},\n'
        )

    def _open(self) -> IO[str]:
        file = self.path.open("a")
        if file.tell() == 0:
            file.write("[\n")
            rank = {"name": f"rank {self._rank} on {socket.gethostname()}"}
            about = [
                ("process_name", 0, rank),
                ("process_sort_index", 0, {"sort_index": self._rank}),
            ]
            about += [("thread_name", lane, {"name": name}) for lane, name in enumerate(LANES)]
            about += [
                ("thread_sort_index", lane, {"sort_index": lane}) for lane in range(len(LANES))
            ]
            for name, lane, notes in about:
                event = {"name": name, "ph": "M", "pid": self._rank, "tid": lane, "args": notes}
                file.write(json.dumps(event) + ",\n")
            file.flush()
        return file


def rank_file(folder: Path, rank: int) -> Path:
    """Where the rank's events are in the folder of a run."""
    return folder / "timeline" / f"rank_{rank:05d}.json"


def cut_torn_line(path: Path) -> None:
    """Cut off what follows the last complete line."""
    text = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(text.rfind(b"\n") + 1)
