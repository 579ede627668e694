"""Slurm's commands, as a user gives them, for the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from cluster import READY_WITHIN_S

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
SBATCH = QUICKSTART / "run.sbatch"
STEPS = 6
KNOBS = (  # the quickstart's prime.toml in seconds
    f"--run.steps={STEPS}",
    "--run.timeout_s=240",
    "--data.max_prompt_length=8",
    "--rollout.prompts_per_step=8",
    "--rollout.prompts_per_round=12",
    "--rollout.max_response_length=16",
    "--policy.lr=1e-3",
    "--policy.mini_batch_size=16",
    "--policy.micro_batch_tokens=128",
    "--prm.lr=1e-3",
    "--prm.mini_batch_size=16",
    "--prm.micro_batch_tokens=128",
    "--evaluate.every=3",
    "--checkpoint.every=2",
)
LOOK = "--seconds 200"  # PREFLIGHT of jobs that look at their nodes; Python starts slowly here
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}


@dataclass
class Slurm:
    """A cluster of ours, and the folder in which jobs are submitted."""

    folder: Path
    keeper: subprocess.Popen[str]
    environ: dict[str, str] = field(default_factory=dict)

    def command(self, *words: object, environ: dict[str, str] | None = None) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env={**self.environ, **(environ or {})},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{words[0]}: {done.stderr}"
        return done.stdout

    def submit(self, *words: object, **environ: object) -> Submitted:
        """`sbatch` with these words and variables."""
        given = {name: str(value) for name, value in environ.items()}
        return Submitted(self, self.command("sbatch", "--parsable", *words, environ=given).strip())

    def kill_slurmd(self, name: str) -> None:
        psutil.Process(int((self.folder / f"{name}.pid").read_text())).kill()

    def start_slurmd(self, name: str) -> None:
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        self.keeper.stdin.write(f"start {name}\n")
        self.keeper.stdin.flush()
        assert self.keeper.stdout.readline() == "started\n"

    def node_states(self) -> dict[str, str]:
        lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End of all daemons and jobs."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait(timeout=60)


def start_slurm(folder: Path, nodes: int, cores: int) -> Slurm:
    """A cluster below `folder`, ready."""
    keeper = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).parent / "cluster.py"),
            str(folder),
            *map(str, (nodes, cores)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # out of reach of what kills a whole process group
    )
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == "ready\n", f"no cluster after {READY_WITHIN_S} s, see stderr"
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    own |= {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}
    own |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PREFLIGHT": "no"}  # sooner
    return Slurm(folder, keeper, own)


@dataclass(frozen=True)
class Submitted:
    """A job, or a task of an array."""

    slurm: Slurm
    number: str  # as sbatch says it, or 7_2

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        text = self.slurm.command("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    @property
    def nodes(self) -> list[str]:
        """Of its last start."""
        nodes = self.facts()["NodeList"]
        return self.slurm.command("scontrol", "show", "hostnames", nodes).split()

    @property
    def output(self) -> str:
        """The job's own file, of all its starts."""
        path = Path(self.facts()["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait_until(self, done: Callable[[], bool], what: str, within_s: float = 400) -> None:
        patience = time.monotonic() + within_s
        while not done():
            assert time.monotonic() < patience, f"not {what} in {within_s} s\n{self.story()}"
            time.sleep(0.1)

    def wait(self, *states: str, within_s: float = 400) -> dict[str, str]:
        """Its facts as soon as it has ended, in one of these states."""
        self.wait_until(lambda: self.state in ENDED, "ended", within_s)
        facts = self.facts()
        assert facts["JobState"] in states, self.story()
        return facts

    def wait_for_step(self, run: Path, step: int) -> None:
        """Return as soon as the step's line is in metrics.jsonl; the job must not end before.

        At once, for steps are short: Slurm, whose answers are not, is only asked now and then.
        """
        metrics = run / "metrics.jsonl"

        def done() -> bool:
            assert self.state not in ENDED, self.story()
            for _ in range(100):
                if metrics.exists() and f'"step": {step},' in metrics.read_text():
                    return True
                time.sleep(0.01)
            return False

        self.wait_until(done, f"at step {step}")

    def wait_for_requeue(self, number: int, within_s: float = 400) -> None:
        """Return as soon as it has been requeued so often."""
        self.wait_until(lambda: self.restarts >= number, f"requeued {number} times", within_s)

    def signal(self, name: str) -> None:
        """To the shell of the job alone, as `--signal=B:…` does."""
        self.slurm.command("scancel", f"--signal={name}", "--batch", self.number)

    def cancel(self) -> None:
        self.slurm.command("scancel", self.number)

    def story(self) -> str:
        """For messages: facts, the job's file and its ranks' logs."""
        logs = {path for path in self.slurm.folder.glob(f"**/logs/{self.number}/rank_*.txt")}
        return "\n".join([str(self.facts()), self.output, *(path.read_text() for path in logs)])


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The tasks of srun's that work on a run's folder, by rank."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            words = process.cmdline()
            if f"--run.folder={run}" in words and "megatron_prime" in words:
                environ, above = process.environ(), process.parent()
                if above is not None and f"--run.folder={run}" not in above.cmdline():
                    found[int(environ["SLURM_PROCID"])] = process
    return found
