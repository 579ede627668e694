"""Real ranks, in gloo collectives, one of which never gets on."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from launch import free_port, run_ranks  # noqa: E402

from megatron_prime.protocols import Phase  # noqa: E402
from megatron_prime.runtime.deadline import Deadlines, ExitTimer  # noqa: E402
from megatron_prime.runtime.watchdog import ENDED, STUCK  # noqa: E402

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("stuck_rank.py")
DEADLINE_S = 3.0
IN_GOOD_ORDER_S, WITHOUT_THE_LOCK_S = 10.0, 18.0  # after the deadline, on a busy machine
NOT_A_STACK = re.compile(r"^\d{4}-|^  thread 0x")


class Ranks:
    """Processes with a deed each, and no launcher."""

    def __init__(self, folder: Path, deeds: list[str]) -> None:
        self.folder = folder
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environ |= {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(len(deeds))}
        self.processes = [
            subprocess.Popen(
                [sys.executable, SCRIPT, folder, str(DEADLINE_S), *deeds],
                env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(len(deeds))
        ]

    def end(self, but: int = -1) -> tuple[list[int], list[str], list[float]]:
        """Exit codes, words, and how long after the last rank's start each of them ended.

        `but` is a rank that stays, and is killed when the others have ended.
        """
        ended: dict[int, float] = {}
        give_up = time.time() + 90
        while len(ended) < len(self.processes):
            if but >= 0 and len(ended) == len(self.processes) - 1 and but not in ended:
                self.processes[but].kill()
            assert time.time() < give_up, [process.poll() for process in self.processes]
            for rank, process in enumerate(self.processes):
                if process.poll() is not None:
                    ended.setdefault(rank, time.time())
            time.sleep(0.02)
        started = max(float(path.read_text()) for path in self.folder.glob("*.started"))
        said = [process.communicate()[1] for process in self.processes]
        codes = [process.returncode for process in self.processes]
        return codes, said, [ended[rank] - started for rank in range(len(codes))]

    def stacks(self, rank: int) -> str:
        return (self.folder / "stuck" / f"rank_{rank:05d}.txt").read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[type[Ranks]]:
    """Starts ranks; whoever is left after the test is killed."""
    started: list[Ranks] = []

    class Started(Ranks):
        def __init__(self, *deeds: str) -> None:
            super().__init__(tmp_path, list(deeds))
            started.append(self)

    yield Started  # type: ignore[misc]
    for these in started:
        these.kill()


def ran_over(folder: Path) -> str:
    return (
        "phase update_prm has lasted longer than 3 s on this rank (deadline.update_prm_s); "
        f"the stacks of all ranks are in {folder / 'stuck'}: look for"
    )


def test_a_rank_that_hangs_is_found_among_those_that_wait_for_it(ranks, tmp_path) -> None:
    these = ranks("meet", "sleep", "meet")
    codes, said, seconds = these.end()
    assert codes == [STUCK] * 3
    (first,) = (rank for rank, words in enumerate(said) if words.startswith(f"[rank {rank}] phase"))
    for rank, words in enumerate(said):  # one line each, and those of the others say whose it is
        who = f"ended because rank {first} on {socket.gethostname()} ended: "
        assert words.startswith(f"[rank {rank}] {'' if rank == first else who}{ran_over(tmp_path)}")
        assert words.count("\n") == 1
    for rank, function in enumerate(("wait_for_the_others", "sleeps_for_ever")):
        assert f"in {function}\n" in these.stacks(rank)
    assert "in sleeps_for_ever" not in these.stacks(0) + these.stacks(2)
    main = re.search(r"thread (0x[0-9a-f]+) is MainThread", these.stacks(1))
    assert main is not None
    assert f"Thread {main[1]} (most recent call first):" in these.stacks(1)
    assert min(seconds) > DEADLINE_S
    assert max(seconds) < DEADLINE_S + IN_GOOD_ORDER_S


@pytest.mark.parametrize("holder", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_holds_the_interpreter_writes_its_stacks_too(ranks, holder: int) -> None:
    """Also rank 0, whose hub then is silent."""
    deeds = ["meet"] * 3
    deeds[holder] = "hold"
    these = ranks(*deeds)
    codes, said, seconds = these.end()
    assert codes == [STUCK] * 3
    assert said[holder] == ""  # it could not speak
    assert f'stuck_rank.py", line {line_of("usleep")} in holds_the_lock' in these.stacks(holder)
    for rank in {0, 1, 2} - {holder}:
        assert "in wait_for_the_others\n" in these.stacks(rank)
        assert "phase update_prm has lasted longer than 3 s" in said[rank]
    assert max(seconds) < DEADLINE_S + WITHOUT_THE_LOCK_S


@pytest.mark.slow
def test_a_silent_rank_writes_its_stacks_before_it_is_given_up(
    ranks, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its phase's deadline; who works on has nothing to write."""
    monkeypatch.setenv("LOST_AFTER_S", "5")
    monkeypatch.setattr(sys.modules[__name__], "DEADLINE_S", 600.0)
    these = ranks("meet", "hold")
    codes, said, _ = these.end(but=1)
    assert codes[0] == ENDED
    assert "because rank 1" in said[0]
    assert "no sign of life" in said[0]
    assert "in holds_the_lock\n" in these.stacks(1)
    assert [path.name for path in (tmp_path / "stuck").iterdir()] == ["rank_00001.txt"]


def test_one_rank_alone(ranks, tmp_path) -> None:
    these = ranks("sleep")
    codes, (said,), (seconds,) = these.end()
    assert codes == [STUCK]
    assert said.startswith(f"[rank 0] {ran_over(tmp_path)}")
    assert "in sleeps_for_ever\n" in these.stacks(0)
    assert DEADLINE_S < seconds < DEADLINE_S + IN_GOOD_ORDER_S


@pytest.mark.slow
def test_under_torchrun(tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"exitcode +: 70") as found:
        run_ranks(SCRIPT, 2, [tmp_path, DEADLINE_S, "sleep", "meet"], timeout_s=90)
    assert ran_over(tmp_path) in str(found.value)
    names = sorted(path.name for path in (tmp_path / "stuck").iterdir())
    assert names == ["rank_00000.txt", "rank_00001.txt"]


@pytest.mark.parametrize(("deed", "codes"), [("meet", [0, 0]), ("kill", [ENDED, -9])])
def test_who_is_not_stuck_leaves_no_file(ranks, tmp_path, deed: str, codes: list[int]) -> None:
    these = ranks("meet", deed)
    assert these.end()[0] == codes
    left = [path.name for path in (tmp_path / "stuck").glob("*")]
    assert left == (["rank_00001.txt"] if deed == "kill" else [])  # kill -9 tidies nothing
    assert deed == "kill" or not (tmp_path / "stuck").exists()


def test_stacks_of_an_earlier_start_stay(tmp_path) -> None:
    def deadlines() -> Deadlines:
        return Deadlines(tmp_path, 3, dict.fromkeys(Phase, 60.0), on_stuck=print)

    with deadlines() as first:
        first.write("the night before")
        first.write("twice")
    with deadlines() as second, second.phase(Phase.SCORE):
        pass
    text = first.path.read_text()
    assert text.count("the night before") == 1
    assert "twice" not in text
    assert f"in {test_stacks_of_an_earlier_start_stay.__name__}\n" in text


def test_a_phase_that_ends_in_time_is_forgotten(tmp_path) -> None:
    told: list[str] = []
    seconds = dict.fromkeys(Phase, 600.0) | {Phase.SCORE: 0.8}
    with Deadlines(tmp_path, 0, seconds, told.append) as deadlines:
        for _ in range(4):  # longer than the deadline together
            with deadlines.phase(Phase.SCORE):
                time.sleep(0.3)
        with deadlines.phase(Phase.GENERATE):
            time.sleep(1.2)
        time.sleep(1.2)
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_entering_a_phase_costs_microseconds(tmp_path) -> None:
    with Deadlines(tmp_path, 0, dict.fromkeys(Phase, 600.0), on_stuck=print) as deadlines:
        started = time.thread_time()
        for _ in range(200):
            with deadlines.phase(Phase.SCORE):
                pass
        assert (time.thread_time() - started) / 200 < 500e-6


def test_the_last_resort_can_be_put_off_and_called_off(tmp_path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from megatron_prime.runtime.deadline import ExitTimer\n"
        "timer = ExitTimer(70)\n"
        "for _ in range(4):\n    timer.set(1.0); time.sleep(0.4)\n"
        "timer.set(0); time.sleep(1.3)\n"
        "print('alive', flush=True); timer.set(0.5); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.returncode) == ("alive\n", STUCK)
    assert ExitTimer(1) is not None


def line_of(words: str) -> int:
    lines = SCRIPT.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if words in line)
