"""Every run.sbatch: linted, accepted by sbatch, run by a real Slurm up to each rank's command."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_client import ROOT, Slurm

from megatron_prime.runtime.rendezvous import rendezvous_from

SBATCHES = sorted((ROOT / "examples").glob("*/run.sbatch"))
SCRIPTS = [*SBATCHES, *(ROOT / "examples").glob("**/*.sh"), *ROOT.glob("tools/*.sh")]
SCRIPTS += [*ROOT.glob("tests/**/*.sh"), ROOT / ".ci/run"]
TASK = """#!/usr/bin/env bash
mkdir -p "$SAID"
env > "$SAID/$SLURM_PROCID"
"""


def of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", SCRIPTS, ids=of)
def test_bash_and_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    command = ["shellcheck", "--external-sources", of(script)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SBATCHES, ids=of)
def test_sbatch_accepts_it(script: Path, slurm: Slurm) -> None:
    assert len(script.read_text().splitlines()) <= 60
    slurm.command("sbatch", "--test-only", script)


@pytest.mark.parametrize("script", SBATCHES, ids=of)
def test_each_rank_knows_its_place(script: Path, slurm: Slurm, tmp_path: Path) -> None:
    """The script as it is, GPU request included; a task says what it sees instead of training."""
    task, said = tmp_path / "task", tmp_path / "said"
    task.write_text(TASK)
    task.chmod(0o755)
    text = script.read_text()
    nodes, tasks, cores = (
        int(re.findall(rf"^#SBATCH --{option}=(\d+)$", text, re.MULTILINE)[0])
        for option in ("nodes", "ntasks-per-node", "cpus-per-task")
    )
    job = slurm.submit(script, PYTHON=task, RUN=tmp_path / "run", SAID=said)
    job.wait("COMPLETED")
    places = {}
    for rank in range(nodes * tasks):
        lines = (said / str(rank)).read_text().splitlines()
        environ = dict(line.split("=", 1) for line in lines if "=" in line)
        place = rendezvous_from(environ)
        assert (place.rank, place.world_size, place.local_world_size) == (
            rank,
            nodes * tasks,
            tasks,
        )
        assert (place.master_addr, place.attempt) == ("127.0.0.1", 0)
        assert environ["SLURM_CPUS_PER_TASK"] == str(cores)
        if "gpus-per-node" in text:
            assert environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7", "all that the node has"
        places[rank] = (environ["SLURMD_NODENAME"], place.local_rank)
    assert len({node for node, _ in places.values()}) == nodes
    assert len(set(places.values())) == nodes * tasks
    assert [local for _, local in places.values()] == list(range(tasks)) * nodes
