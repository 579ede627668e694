"""Clocks, the board, the shared folder, stages of all-reduces, and the table."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from made_up import facts, healthy, spoil

from megatron_prime.preflight import clocks, shared_folder
from megatron_prime.preflight.checks import problems_of
from megatron_prime.preflight.collectives import stages_of
from megatron_prime.preflight.exchange import Board
from megatron_prime.preflight.facts import Clock, Timing
from megatron_prime.preflight.shared_folder import Trial
from megatron_prime.preflight.steps import Go, Times, within
from megatron_prime.preflight.table import report


def board() -> Board:
    return Board(dist.HashStore())


def test_the_fastest_round_says_most() -> None:
    """Their clock is 10 s ahead; way and return took 1 + 3 s, then 0.5 + 0.5 s."""
    assert clocks.best([(100.0, 111.0, 104.0), (200.0, 210.5, 201.0)]) == Clock(10.0, 0.5)
    slow = clocks.best([(100.0, 111.0, 104.0)])
    assert abs(slow.offset - 10.0) <= slow.error == 2.0


def test_a_clock_is_asked_over_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, until = board(), time.monotonic() + 30
    real, mine = time.time, threading.get_ident()
    ahead = SimpleNamespace(time=lambda: real() + (0 if threading.get_ident() == mine else 5.0))
    monkeypatch.setattr(clocks, "time", ahead)
    other = threading.Thread(target=clocks.answer, args=(pinned, 2, until))
    other.start()
    found = clocks.ask(pinned, 2, until)
    other.join()
    assert found is not None
    assert abs(found.offset - 5.0) <= found.error + 1e-3


def test_who_does_not_answer_has_no_clock() -> None:
    began = time.monotonic()
    assert clocks.ask(board(), 2, began + 0.3) is None
    assert time.monotonic() - began < 5


def test_waits_at_the_board_end() -> None:
    pinned = board()
    pinned.pin("a", "1")
    assert pinned.read("a", 0.0) == "1"
    assert pinned.read("b", time.monotonic() + 0.2) is None
    assert pinned.read_at_once("b", time.monotonic() + 0.2) is None
    threading.Timer(0.3, pinned.pin, ("b", "2")).start()
    assert pinned.read_all(["a", "b", "c"], time.monotonic() + 1.5) == {"a": "1", "b": "2"}


def test_within() -> None:
    assert within(lambda: 3, time.monotonic() + 30) == 3
    never = threading.Event()
    assert within(never.wait, time.monotonic() + 0.2) is None
    never.set()


def test_the_timetable_goes_by_rank_0s_clock() -> None:
    times = Times.of(100.0, 60.0)
    assert times[0] == pytest.approx(140.0)
    assert times.end == 160.0
    assert list(times) == sorted(times)
    now = time.monotonic()
    mine = Go((1.0, 2.0, 3.0, 4.0, 5.0), "", 0).times()
    assert mine.end == pytest.approx(now + 5.0, abs=1.0)


def test_a_shared_folder_and_what_is_left_of_it(tmp_path: Path) -> None:
    first = Trial(tmp_path / "run", "11")
    assert first.open() == ""
    assert Trial(tmp_path / "run", "11").visit("rank_2") == ""
    assert first.unseen(["rank_2"]) == []
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    trial = Trial(tmp_path, "11")
    assert trial.open() == ""
    trial.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_folders_that_are_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "APPEARS_S", 0.2)
    first = Trial(tmp_path / "a", "11")
    assert first.open() == ""
    assert "is not there" in Trial(tmp_path / "b", "11").visit("rank_2")
    (tmp_path / "b").mkdir()
    assert "is another folder" in Trial(tmp_path / "b", "11").visit("rank_2")
    (first.path / "rank_0").write_text("of an older trial")
    assert "is another folder" in Trial(tmp_path / "a", "11").visit("rank_2")
    assert first.unseen(["rank_2"]) == ["rank_2"]


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in Trial(tmp_path / "file" / "run", "11").open()
    assert "Not a directory" in Trial(tmp_path / "file" / "run", "11").visit("rank_2")


def test_a_file_appears_late(tmp_path: Path) -> None:
    """As on a network file system."""
    late = Trial(tmp_path, "11")
    threading.Timer(0.5, late.open).start()
    assert Trial(tmp_path, "11").visit("rank_2") == ""


def test_stages() -> None:
    one = stages_of([[0, 1]], on_gpu=True)
    assert [(stage.name, stage.backend) for stage in one] == [("gloo", "gloo"), ("node", "nccl")]
    two = stages_of([[0, 1], [2, 3]], on_gpu=True)
    assert [stage.groups for stage in two] == [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 1, 2, 3),)]
    assert [stage.name for stage in stages_of([[0], [1]], on_gpu=False)] == ["gloo", "node"]


@pytest.mark.parametrize("nodes", [3, 4, 5, 16])
def test_every_node_has_a_neighbour_and_no_rank_two_groups(nodes: int) -> None:
    members = [[2 * i, 2 * i + 1] for i in range(nodes)]
    pairs = [stage for stage in stages_of(members, on_gpu=True) if stage.name == "pairs"]
    assert len(pairs) == 2
    met = [rank for stage in pairs for group in stage.groups for rank in group]
    for stage in pairs:
        ranks = [rank for group in stage.groups for rank in group]
        assert len(ranks) == len(set(ranks))
        assert all(len(group) == 4 and group == tuple(sorted(group)) for group in stage.groups)
    least = 2 if nodes % 2 == 0 else 1
    assert all(least <= met.count(rank) <= 2 for rank in range(2 * nodes))
    assert sum(met.count(rank) == 1 for rank in range(2 * nodes)) == (0 if nodes % 2 == 0 else 4)


def test_bandwidth_counts_as_nccl_tests_do() -> None:
    """8 ranks, 1 GB in 10 ms: 100 GB/s of the algorithm, 175 on the bus."""
    assert Timing("all", tuple(range(8)), 10**9, 0.01, True).gigabytes_per_s == pytest.approx(175)


def test_the_report() -> None:
    found = healthy()
    spoil(found, 3, versions={**(facts(3).versions or {}), "torch": "2.12.0"})
    found.clocks = {2: Clock(-2.5, 0.001)}
    text = report(found, problems_of(found), 12.34, 78).splitlines()
    head, first, second = (line.split("  ") for line in text[:3])
    assert [len(line.rstrip()) <= 200 for line in text[:3]] == [True] * 3
    assert (head[0].strip(), first[0], second[0]) == ("node", "gpu00", "gpu01")
    row = [cell.strip() for cell in second if cell.strip()]
    assert row[1:10] == [
        *("2–3", "AB", "2 × H100", "79 GiB", "900 GiB", "500 GiB", "shared", "1.95 TiB", "ok")
    ]
    assert row[10:] == ["-2500.0 ± 1.0 ms", "10.0 ms, 26.84 GB/s"]
    assert any(line.startswith("versions B: ") and "torch 2.12.0" in line for line in text)
    assert (
        "needs, by plan: 60 GiB per GPU, 100 GiB of host memory per node, 615 GiB of disk "
        "(3 × 200 GiB, and the model)" in text
    )
    refused = [line for line in text if line.startswith("REFUSED")]
    assert refused[0].startswith("REFUSED  rank 3 on gpu01: found torch 2.12.0; wanted 2.13.0")
    assert next(line for line in text if line.startswith("warning")).startswith("warning  gpu01")
    assert text[-1] == "[preflight] refused: 1 refusals, 1 warnings; 12.3 s"


def test_what_is_not_known_is_not_made_up() -> None:
    found = healthy()
    found.facts = {rank: one for rank, one in found.facts.items() if rank < 2}
    found.clocks, found.shared, found.reduced, found.needs = {}, {0: ""}, {}, None
    line = report(found, [], 1.0, 0).splitlines()[2]
    assert line.split() == ["gpu01", "2–3", *["?"] * 8, "?", "?"][: len(line.split())]
    assert set(line.split()[2:]) == {"?"}


def test_torch_is_not_asked_for_gpus_that_are_not_there() -> None:
    from megatron_prime.preflight.probes import gpu

    if torch.cuda.is_available():
        assert gpu(0) is not None
    else:
        assert gpu(0) is None
