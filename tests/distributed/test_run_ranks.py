"""A launch that fails or hangs is told, and leaves nobody behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from launch import run_ranks

pytestmark = pytest.mark.distributed


def test_output_of_a_rank_that_fails(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('about to fail'); sys.exit(3)")
    with pytest.raises(AssertionError, match=r"(?s)exit status 1.*about to fail"):
        run_ranks(script, 2)


def test_hanging_ranks_are_killed(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(
        "import os, sys, time\n"
        "open(f'{sys.argv[1]}/{os.getpid()}.pid', 'w').close()\n"
        "print('hanging', flush=True)\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(AssertionError, match=r"(?s)no end after 25 s.*hanging"):
        run_ranks(script, 2, [tmp_path], timeout_s=25)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    assert not any(runs(pid) for pid in pids)


def runs(pid: int) -> bool:
    """Whether the process is there and not merely waiting for init to collect it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
