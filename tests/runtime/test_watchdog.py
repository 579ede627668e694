"""Ranks as plain processes, without a launcher: what happens to the others when one ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prime.runtime.hub import Hub
from megatron_prime.runtime.watchdog import ENDED, Watchdog, beat_seconds

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("watched_rank.py")
HOST = socket.gethostname()
# Far below any patience that a test gives: only a broken line or a report is so quick.
AT_ONCE_S = 60.0
LONG_S = 600.0


class Ranks:
    """Ranks with a deed each."""

    def __init__(self, folder: Path, deeds: list[str], lost_after_s: float = LONG_S) -> None:
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    SCRIPT,
                    folder,
                    str(rank),
                    str(len(deeds)),
                    str(lost_after_s),
                    deed,
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, deed in enumerate(deeds)
            if deed != "absent"
        ]

    def wait_until_joined(self) -> None:
        while len(list(self.folder.glob("*.pid"))) < len(self.processes):
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.01)

    def send(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def end(self, within_s: float, but: int = -1) -> tuple[list[int | None], list[str]]:
        """Exit codes and words of all ranks but one, which must all end in time."""
        deadline = time.monotonic() + within_s
        ranks = [(rank, p) for rank, p in enumerate(self.processes) if rank != but]
        for _, process in ranks:
            process.wait(max(deadline - time.monotonic(), 0.1))
        said = [process.communicate()[1].strip() for _, process in ranks]
        return [process.returncode for _, process in ranks], said

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[type[Ranks]]:
    """Starts ranks; whoever is left after the test is killed."""
    started: list[Ranks] = []

    class Started(Ranks):
        def __init__(self, deeds: list[str], lost_after_s: float = LONG_S) -> None:
            super().__init__(tmp_path, deeds, lost_after_s)
            started.append(self)

    yield Started  # type: ignore[misc]
    for these in started:
        these.kill()


def because(rank: int, culprit: int, error: str) -> str:
    return f"[rank {rank}] ended because rank {culprit} on {HOST} ended: {error}"


KILLED = "it was killed (kill -9, out of memory), or it crashed"


@pytest.mark.parametrize("last", [0, 2])
def test_a_good_end_waits_for_the_last(ranks, last: int) -> None:
    deeds = ["finish:0", "finish:0", "finish:0"]
    deeds[last] = "finish:3"
    started = time.monotonic()
    assert ranks(deeds).end(AT_ONCE_S) == ([0, 0, 0], ["", "", ""])
    assert time.monotonic() - started > 3


def test_a_rank_that_is_lost_after_its_work_is_not_waited_for(ranks) -> None:
    assert ranks(["finish:0", "desert", "finish:3"]).end(AT_ONCE_S) == ([0, 5, 0], ["", "", ""])


def test_an_error_is_told_to_all(ranks) -> None:
    codes, said = ranks(["wait", "fail:no memory", "wait"]).end(AT_ONCE_S)
    assert codes == [ENDED, 1, ENDED]
    assert said == [because(0, 1, "no memory"), "[rank 1] no memory", because(2, 1, "no memory")]


def test_an_error_of_rank_0_is_told_to_all(ranks) -> None:
    codes, said = ranks(["fail:no memory", "wait"]).end(AT_ONCE_S)
    assert (codes, said) == ([1, ENDED], ["[rank 0] no memory", because(1, 0, "no memory")])


def test_an_error_that_all_meet_is_said_once(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_S", "10")  # they may meet it seconds apart on a busy machine
    codes, said = ranks(["fail:bad data"] * 3).end(AT_ONCE_S)
    assert codes == [1, 1, 1]
    assert len(" ".join(said).split()) == len(["[rank", "0]", "bad", "data"])


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_noticed_at_once(ranks, killed: int) -> None:
    these = ranks(["wait"] * 3)
    these.wait_until_joined()
    these.send(killed, signal.SIGKILL)
    codes, said = these.end(AT_ONCE_S, but=killed)
    assert codes == [ENDED, ENDED]
    host = "127.0.0.1" if killed == 0 else HOST  # rank 0 is known by its address
    others = [rank for rank in range(3) if rank != killed]
    assert said == [because(r, killed, KILLED).replace(HOST, host) for r in others]


def test_a_killed_rank_whose_children_live_on_is_noticed_at_once(ranks) -> None:
    """A checkpoint's writers are forks, with a copy of every connection."""
    codes, said = ranks(["wait", "fork"]).end(AT_ONCE_S, but=1)
    assert (codes, said) == ([ENDED], [because(0, 1, KILLED)])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_noticed_by_its_silence(ranks, frozen: int) -> None:
    these = ranks(["wait"] * 3, lost_after_s=4)
    these.wait_until_joined()
    these.send(frozen, signal.SIGSTOP)
    codes, said = these.end(4 + AT_ONCE_S, but=frozen)
    assert codes == [ENDED, ENDED]
    assert all(f"because rank {frozen} on " in line for line in said)
    assert all("no sign of life of it for" in line for line in said)
    these.send(frozen, signal.SIGCONT)
    these.processes[frozen].communicate(timeout=AT_ONCE_S)
    assert these.processes[frozen].returncode == ENDED


def test_a_rank_that_holds_the_interpreter_is_left_alone_for_its_patience(ranks) -> None:
    codes, _ = ranks(["finish:0", "hold:4"], lost_after_s=9).end(4 + AT_ONCE_S)
    assert codes == [0, 0]


def test_a_broken_connection_is_blamed_on_the_one_who_broke_it(ranks) -> None:
    these = ranks(["wait", "fail:Connection closed by peer:echo", "fork"])
    codes, said = these.end(AT_ONCE_S, but=2)
    assert codes == [ENDED, 1]
    assert said == [because(0, 2, KILLED), because(1, 2, KILLED)]


def test_a_broken_connection_that_nobody_explains_is_an_error_of_its_own(ranks) -> None:
    codes, said = ranks(["wait", "fail:Connection closed:echo"]).end(AT_ONCE_S)
    assert codes == [ENDED, 1]
    assert said == [because(0, 1, "Connection closed"), "[rank 1] Connection closed"]


def test_a_rank_that_never_comes_is_named(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOIN_S", "2")
    codes, said = ranks(["wait", "absent", "wait", "absent"]).end(AT_ONCE_S)
    assert codes == [ENDED, ENDED]
    assert said[0] == because(0, 0, "after run.timeout_s = 2 s it waits for 1, 3")


def test_strangers_at_the_hub_s_port_are_sent_away() -> None:
    hub = Hub("127.0.0.1", 1, beat_s=0.1, timeout_s=60)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "failed", "error": "x"}\n', b"[]\n"):
        with socket.create_connection(("127.0.0.1", hub.port), timeout=10) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
    wrong = b'{"kind": "hello", "rank": 0, "host": "h", "token": "guessed"}\n'
    with socket.create_connection(("127.0.0.1", hub.port), timeout=10) as stranger:
        stranger.sendall(wrong)
        assert stranger.recv(100) == b""
    watchdog = Watchdog(0, ("127.0.0.1", hub.port), hub.token, 60, 60, hub)
    watchdog.finish()
    assert watchdog.ending is None


def test_beats_are_nine_to_a_patience() -> None:
    assert [beat_seconds(s) for s in (9, 45, 600)] == [1, 5, 5]


def test_no_thread_keeps_a_process_alive() -> None:
    code = (
        "from megatron_prime.runtime.hub import Hub\n"
        "from megatron_prime.runtime.watchdog import Watchdog\n"
        "hub = Hub('127.0.0.1', 1, 5, 60)\n"
        "Watchdog(0, ('127.0.0.1', hub.port), hub.token, 60, 60, hub)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=AT_ONCE_S, env=os.environ)
