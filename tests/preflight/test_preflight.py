"""Four real processes that pretend to be two nodes of a Slurm job: what rank 0 says, and when."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("distributed", "planner")]

from launch import free_port, run_ranks  # noqa: E402
from planned_runs import TINY  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
SPOILT = Path(__file__).parent / "spoilt_rank.py"
PATIENCE_S = 150  # of a preflight where nothing hangs: Python starts slowly on a busy machine
LIMIT_S = 60  # of one where something does
SLACK_S = 15  # for processes to be started, and reaped, on a busy machine
RANKS = 4


@dataclass(frozen=True)
class Outcome:
    """Of all ranks that were started."""

    codes: list[int]
    output: str  # of rank 0 and of all others
    seconds: float

    def refusals(self) -> list[str]:
        """Lines of them; there may be warnings of slow all-reduces on a busy machine."""
        return [line for line in self.output.splitlines() if line.startswith(("REFUSED", "LATE"))]

    def row(self, node: str) -> list[str]:
        """The cells of a node's line."""
        line = next(line for line in self.output.splitlines() if line.startswith(node))
        return re.split(r" {2,}", line)


@dataclass(frozen=True)
class Job:
    """A run's files, and its ranks."""

    folder: Path

    def arguments(self, *more: str) -> list[str]:
        return ["preflight", str(self.folder / "run.toml"), f"--seconds={PATIENCE_S}", *more]

    def start(self, rank: int, port: int, deed: str, *more: str) -> subprocess.Popen[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        slurm = {
            "SLURM_PROCID": str(rank),
            "SLURM_STEP_NUM_TASKS": str(RANKS),
            "SLURM_LOCALID": str(rank % 2),
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            "SLURMD_NODENAME": f"gpu0{rank // 2}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, str(SPOILT), deed, *self.arguments(*more)],
            env=own | slurm,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, deeds: dict[int, str] | None = None, *more: str, port: int = 0, absent: int = RANKS
    ) -> Outcome:
        """All ranks below `absent`, of which some do as `deeds` say."""
        began, port = time.monotonic(), port or free_port()
        ranks = [
            self.start(rank, port, (deeds or {}).get(rank, "none"), *more)
            for rank in range(min(absent, RANKS))
        ]
        try:
            outputs = [rank.communicate(timeout=PATIENCE_S + 60)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return Outcome([r.returncode for r in ranks], "".join(outputs), time.monotonic() - began)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY))
    (model / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "run.toml").write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nhf = "{model}"\n'
        f'[data]\ntrain = "{tmp_path}/train.jsonl"\n'
    )
    return Job(tmp_path)


def test_all_is_well(job: Job) -> None:
    found = job.run()
    assert found.codes == [0] * RANKS, found.output
    assert found.refusals() == []
    for node, ranks in {"gpu00": "0–1", "gpu01": "2–3"}.items():
        row = found.row(node)
        assert row[1:4] == [ranks, "A", "CPU"]
        assert {"shared", "ok"} <= set(row)
        assert re.search(r"^[\d.]+ ms, [\d.]+ GB/s$", row[-1])
    offset = re.search(r"gpu01 .*  ([+-][\d.]+) ± ([\d.]+) ms", found.output)
    assert offset  # it is the same clock
    assert abs(float(offset[1])) <= float(offset[2]) + 0.1
    assert "all-reduce of all ranks, gloo" in found.output
    assert found.output.count("[preflight]") == 1
    assert found.output.rstrip().splitlines()[-1].startswith("[preflight] go: ")
    assert not (job.folder / "run").exists(), "what it made, it removes"


def test_a_rank_that_does_not_come(job: Job) -> None:
    found = job.run({}, f"--seconds={LIMIT_S}", absent=3)
    assert found.codes == [77] * 3, found.output
    assert found.seconds < LIMIT_S + SLACK_S
    assert [line.partition(";")[0] for line in found.refusals()] == [
        "LATE  rank 3: found did not come within 40 s"
    ]
    assert found.row("gpu00")[1] == "0–1"


def test_all_problems_are_told_at_once(job: Job) -> None:
    """Another version on a rank; on a node a full disk, a clock ahead, and a /tmp of its own."""
    found = job.run({1: "version", 2: "disk+clock+blind"})
    assert found.codes == [78] * RANKS, found.output
    refusals = found.refusals()
    other = [line for line in refusals if line.startswith("REFUSED  rank 1 on gpu00: found numpy ")]
    assert "found numpy numpy-of-this-node; wanted" in other[0]
    assert "as on 3 of 4" in other[0]
    of_node = [line for line in refusals if line.startswith("REFUSED  gpu01: ")]
    full = next(line for line in of_node if "below run.folder" in line)
    assert "found 0.0 GiB free" in full
    assert "checkpoint.keep" in full
    assert any("found a clock 120.0 s ahead of rank 0's" in line for line in of_node)
    private = next(line for line in of_node if "is another folder" in line)
    assert "a file that rank 0 wrote is not seen in it" in private
    assert "run.folder: an absolute path on a shared file system" in private
    assert found.row("gpu00")[2] == "AB"
    assert "NO" in found.row("gpu01")
    assert len(of_node) == 3


@pytest.mark.slow
def test_warn_only_says_the_same_and_goes_on(job: Job) -> None:
    found = job.run({2: "clock"}, "--warn-only")
    assert found.codes == [0] * RANKS, found.output
    assert [line.partition(" s ")[0] for line in found.refusals()] == [
        "REFUSED  gpu01: found a clock 120.0"
    ]
    assert "[preflight] go, as was asked for: 1 refusals" in found.output


def test_an_all_reduce_that_hangs_is_named_in_time(job: Job) -> None:
    found = job.run({3: "sleep"}, f"--seconds={LIMIT_S}")
    assert found.codes == [77] * RANKS, found.output
    assert found.seconds < LIMIT_S + SLACK_S
    assert len(found.refusals()) == 1
    named = found.refusals()[0]
    assert named.startswith("LATE  ")
    assert "the all-reduce of all ranks by gloo" in named


@pytest.mark.slow
def test_a_probe_that_hangs_is_named_in_time(job: Job) -> None:
    found = job.run({2: "probe"}, f"--seconds={LIMIT_S}")
    assert found.codes == [77] * RANKS, found.output
    assert found.seconds < LIMIT_S + SLACK_S
    assert [line.partition(";")[0] for line in found.refusals()] == [
        "LATE  gpu01: found no answer about model and data"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_that_dies_before_it_tells_blames_nobody_else(rank: int, job: Job) -> None:
    found = job.run({rank: "dies"}, f"--seconds={LIMIT_S}")
    assert found.codes == [9 if one == rank else 77 for one in range(RANKS)], found.output
    assert [line.partition(";")[0] for line in found.refusals()] == [
        f"LATE  rank {rank} on gpu01: found came, but told nothing"
    ]


@pytest.mark.slow
def test_a_folder_that_nobody_can_write_to(job: Job) -> None:
    (job.folder / "file").touch()
    found = job.run({}, f"--run.folder={job.folder}/file/run")
    assert found.codes == [78] * RANKS, found.output
    assert "Not a directory" in found.refusals()[0]


def test_a_port_in_use(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = job.run({}, "--seconds=30", port=taken.getsockname()[1])
    # The others only know that rank 0 did not come; the job's code is the highest.
    assert found.codes == [78, 77, 77, 77], found.output
    assert found.seconds < 30 + SLACK_S
    assert "rank 0 on gpu00 can't listen at 127.0.0.1" in found.output
    assert "MASTER_PORT" in found.output


def test_a_bad_configuration_is_told_by_rank_0_alone(job: Job) -> None:
    found = job.run({}, "--rollout.group_size=1")
    assert found.codes == [2] * RANKS, found.output
    assert found.output.count("rollout.group_size: found 1") == 1
    assert "[preflight]" not in found.output


@pytest.mark.slow
def test_a_rank_with_other_knobs(job: Job) -> None:
    """Its copy of run.toml is older, say."""
    port = free_port()
    ranks = [
        job.start(rank, port, "none", *(["--run.seed=1"] if rank == 2 else []))
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate(timeout=PATIENCE_S + 60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [78] * RANKS
    assert "REFUSED  rank 2 on gpu01: found configuration" in outputs[0]


def test_a_signal_ends_it_as_it_ends_a_run_before_its_first_step(job: Job) -> None:
    port = free_port()
    rank = job.start(0, port, "none")
    until = time.monotonic() + PATIENCE_S
    with socket.socket() as caller:
        while caller.connect_ex(("127.0.0.1", port)):  # then it waits for the others
            assert time.monotonic() < until
            time.sleep(0.1)
    rank.send_signal(signal.SIGUSR1)
    rank.communicate(timeout=30)
    assert rank.returncode == 75


@pytest.mark.slow
def test_under_torchrun(job: Job) -> None:
    output = run_ranks("megatron_prime", 2, job.arguments())
    assert f"{socket.gethostname()}  0–1" in re.sub(r" +0–1", "  0–1", output)
    assert "[preflight] go: " in output


def test_alone(job: Job) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prime", *job.arguments()],
        env=own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S + 60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[preflight] go: no problems" in done.stdout
