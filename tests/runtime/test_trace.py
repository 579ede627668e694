from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_prime.runtime import trace as module
from megatron_prime.runtime.trace import LANES, Trace, rank_file


def events(path: Path) -> list[dict]:
    """As a reader of Chrome's format takes a file: what is missing at its end is put there."""
    text = path.read_text()
    assert text.startswith("[\n")
    return json.loads(text.rstrip().rstrip(",") + "]")


def spans(path: Path) -> list[str]:
    return [event["name"] for event in events(path) if event["ph"] == "X"]


def test_a_file_can_be_read_while_it_grows(tmp_path: Path) -> None:
    trace = Trace(tmp_path, 12, fresh=True)
    trace.span("moves", 'a "quoted" name', 10.0, 10.5, bytes=7)
    trace.flush()
    trace.span("idle", "not flushed", 11.0, 12.0)
    path = tmp_path / "timeline" / "rank_00012.json"
    (span,) = (event for event in events(path) if event["ph"] == "X")
    assert span["name"] == 'a "quoted" name'
    assert (span["cat"], span["pid"], LANES[span["tid"]]) == ("moves", 12, "moves")
    assert (span["dur"], span["args"]) == (500_000, {"bytes": 7})
    names = {e["args"]["name"] for e in events(path) if e["name"] == "thread_name"}
    assert names == set(LANES)
    (process,) = (e["args"]["name"] for e in events(path) if e["name"] == "process_name")
    assert process.startswith("rank 12 on ")
    trace.close()
    assert spans(path) == ['a "quoted" name', "not flushed"]


def test_times_are_the_wall_clock_s_so_that_ranks_line_up(tmp_path: Path) -> None:
    trace = Trace(tmp_path, 0, fresh=True)
    now = time.perf_counter()
    wall = time.time()
    trace.span("phases", "score", now, now + 1)
    trace.close()
    (span,) = (event for event in events(rank_file(tmp_path, 0)) if event["ph"] == "X")
    assert span["ts"] / 1e6 == pytest.approx(wall, abs=0.05)


def test_a_continued_run_appends_and_cuts_off_what_a_crash_tore(tmp_path: Path) -> None:
    first = Trace(tmp_path, 0, fresh=True)
    first.span("phases", "score", 1.0, 2.0)
    first.close()
    with first.path.open("a") as file:
        file.write('{"name":"torn","ph":"X","ts":17')
    second = Trace(tmp_path, 0, fresh=False)
    second.span("phases", "generate", 1.0, 2.0)
    second.close()
    assert spans(first.path) == ["score", "generate"]
    assert len([e for e in events(first.path) if e["name"] == "process_name"]) == 1


def test_a_fresh_run_begins_anew(tmp_path: Path) -> None:
    for name in ("score", "generate"):
        trace = Trace(tmp_path, 0, fresh=True)
        trace.span("phases", name, 1.0, 2.0)
        trace.close()
    assert spans(trace.path) == ["generate"]


def test_what_is_kept_is_bounded_and_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 4000)
    trace = Trace(tmp_path, 0, fresh=True)
    for number in range(500):
        trace.span("phases", f"number {number}", 1.0, 2.0)
        trace.flush()
    trace.close()
    older = trace.path.with_suffix(".previous.json")
    assert sorted(trace.path.parent.iterdir()) == [trace.path, older]
    assert max(older.stat().st_size, trace.path.stat().st_size) < 4200
    kept = spans(older) + spans(trace.path)
    assert kept == [f"number {number}" for number in range(500 - len(kept), 500)]
    assert len(spans(older)) > 20


def test_an_event_costs_less_than_20_microseconds(tmp_path: Path) -> None:
    trace = Trace(tmp_path, 0, fresh=True)
    started = time.thread_time()
    for _ in range(5000):
        trace.span("idle", "straggling", 1.0, 2.0)
    assert (time.thread_time() - started) / 5000 < 20e-6
    trace.close()
