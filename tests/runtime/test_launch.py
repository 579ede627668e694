"""How a process joins and ends: real ones, with torch but without models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from launch import free_port, run_ranks  # noqa: E402

pytestmark = pytest.mark.long

HEAD = """
import os, signal, sys, time
from megatron_prime.config import ConfigError
from megatron_prime.errors import OtherRankFailed, RunError
from megatron_prime.runtime.launch import Launch, is_echo
from megatron_prime.runtime.rendezvous import rendezvous_from
"""
ALONE = HEAD + "launch = Launch(rendezvous_from(os.environ), 45, 60, saves={saves})\n"


def alone(code: str, saves: bool = True) -> tuple[int, str]:
    """Exit code and words of a run of one rank."""
    launcher = ("RANK", "WORLD_SIZE")
    environ = {name: value for name, value in os.environ.items() if name not in launcher}
    command = [sys.executable, "-c", ALONE.format(saves=saves) + code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("error", "code"), [("RunError('no room')", 1), ("ConfigError('bad knob')", 2)]
)
def test_what_a_user_can_mend_is_said_in_a_line(error: str, code: int) -> None:
    said = {1: "[rank 0] no room\n", 2: "[rank 0] bad knob\n"}[code]
    assert alone(f"sys.exit(launch.failed({error}))") == (code, said)


def test_a_fault_of_ours_has_its_traceback() -> None:
    code = "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    sys.exit(launch.failed(e))"
    status, said = alone(code)
    assert status == 1
    assert said.startswith("Traceback")
    assert said.endswith("\n[rank 0] ZeroDivisionError: division by zero\n")


def test_ctrl_c() -> None:
    assert alone("sys.exit(launch.failed(KeyboardInterrupt()))")[0] == 130


@pytest.mark.parametrize(("saves", "code"), [(True, 75), (False, 143)])
def test_sigterm_where_nothing_can_be_saved(saves: bool, code: int) -> None:
    inside = "with launch.steps(agree=None):\n    os.kill(os.getpid(), 15); time.sleep(50)"
    for outside in ("os.kill(os.getpid(), 15); time.sleep(50)", inside):
        status, said = alone(outside, saves)
        assert status == code
        assert said.startswith("[rank 0] SIGTERM: ended at once, for there is nothing to save")


def test_sigterm_in_the_loop_waits_for_the_question() -> None:
    code = """
with launch.steps(agree=lambda number: number):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print(launch.signals.asked(), flush=True)
    os._exit(3)
"""
    assert alone(code) == (3, "SIGTERM\n")


def test_without_rank_0_nothing_is_waited_for_longer_than_said() -> None:
    code = "Launch(rendezvous_from(os.environ), 45, 2, saves=True)"
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port())}
    ended = subprocess.run(
        [sys.executable, "-c", HEAD + code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environ,
    )
    assert ended.returncode == 1
    assert "RanksDontMeet: found no rank 0 at 127.0.0.1:" in ended.stderr
    assert "within run.timeout_s = 2 s" in ended.stderr


@pytest.mark.distributed
def test_a_broken_connection_is_told_from_an_error(tmp_path: Path) -> None:
    """What gloo raises when the other rank is gone, straight and as the cause of another error."""
    script = tmp_path / "echo.py"
    script.write_text(
        HEAD
        + """
import datetime, torch, torch.distributed as dist
launch = Launch(rendezvous_from(os.environ), 45, 60, saves=True)
dist.init_process_group("gloo", store=launch.store, rank=launch.here.rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))
dist.barrier()
launch.finish()
if launch.here.rank == 1:
    os._exit(0)
try:
    for _ in range(100):
        dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    wrapped = RunError("a save failed")
    wrapped.__cause__ = error
    print("echoes:", is_echo(error), is_echo(wrapped), is_echo(OtherRankFailed("x")))
print("own:", is_echo(RuntimeError("CUDA error")), is_echo(RunError("no room")), flush=True)
os._exit(0)
"""
    )
    output = run_ranks(script, 2)
    assert "echoes: True True True" in output
    assert "own: False False" in output


@pytest.mark.distributed
def test_torchrun_may_start_the_ranks_again(tmp_path: Path) -> None:
    """The second start meets at another hub, not at the one that is gone."""
    script = tmp_path / "again.py"
    script.write_text(
        HEAD
        + """
launch = Launch(rendezvous_from(os.environ), 45, 60, saves=True)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
if attempt == "0":
    os._exit(launch.failed(RunError("not yet")))
launch.finish()
print(f"done at {attempt}", flush=True)
"""
    )
    assert run_ranks(script, 2, launcher=["--max-restarts=1"]).count("done at 1") == 2
