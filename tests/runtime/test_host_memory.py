"""Limits of control groups, in folders made as the kernel's."""

from __future__ import annotations

from pathlib import Path

import psutil

from megatron_prime.runtime.host_memory import host_bytes, limits


def test_a_limit_of_any_group_above_counts(tmp_path: Path) -> None:
    job = tmp_path / "groups/slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "step_0/memory.max").write_text("max\n")
    (job / "memory.max").write_text("4096\n")
    (job.parent / "memory.max").write_text("8192\n")
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_7/step_0\n")
    assert list(limits(own, tmp_path / "groups")) == [4096, 8192]
    assert host_bytes(own, tmp_path / "groups") == 4096


def test_version_1(tmp_path: Path) -> None:
    job = tmp_path / "groups/memory/job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("4096\n")
    (job.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    own = tmp_path / "own"
    own.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    assert host_bytes(own, tmp_path / "groups") == 4096


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert host_bytes(tmp_path / "absent", tmp_path) == psutil.virtual_memory().total
    own = tmp_path / "own"
    own.write_text("0::/not/in/this/view\n")
    assert host_bytes(own, tmp_path) == psutil.virtual_memory().total
