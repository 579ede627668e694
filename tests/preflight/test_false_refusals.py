"""What a healthy cluster may look like: a preflight must not refuse it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_up import healthy, spoil

from megatron_prime import __main__ as command_line
from megatron_prime.preflight.checks import problems_of

ROOT = Path(__file__).parents[2]


def refusals(found: object) -> list[str]:
    return [one.found for one in problems_of(found) if one.refuses]  # type: ignore[arg-type]


def test_a_go_ends_without_pythons_tidying(tmp_path: Path) -> None:
    """What would hang or fail after the verdict never comes."""
    (tmp_path / "run.toml").write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nhf = "{tmp_path}"\n'
        f'[data]\ntrain = "{tmp_path}"\n'
    )
    program = (
        "import atexit, os, sys\n"
        "from megatron_prime import __main__ as command_line\n"
        "from megatron_prime.preflight import door\n"
        "atexit.register(os._exit, 78)\n"
        "door.preflight = lambda *_: print('the verdict') or 0\n"
        f"sys.exit(command_line.main(['preflight', {str(tmp_path / 'run.toml')!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "the verdict\n"), done.stderr


@pytest.mark.parametrize(
    ("environ", "asks"),
    [
        ({}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "0"}, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"SLURM_JOB_GPUS": "0"}, True),
        ({"SLURM_GPUS_ON_NODE": "8"}, True),
    ],
)
def test_who_was_given_gpus(environ: dict[str, str], asks: bool) -> None:
    assert command_line._asks_for_gpus(environ) is asks


def test_a_cpu_run_on_a_node_that_has_gpus() -> None:
    found = healthy()
    for rank in found.facts:
        spoil(found, rank, gpu=None, has_gpu_device=True, asks_for_gpus=False)
    assert refusals(found) == []
    assert len(problems_of(found)) == 1
