"""What the composition root refuses before any process group starts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.runtime.rendezvous import Rendezvous

before_megatron_import()
build = pytest.importorskip("megatron_prime.build")
ALONE = Rendezvous()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU can't do")
def test_number_formats_that_this_machine_has_not() -> None:
    smallest = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
    formats = {"policy": {"fp8": "hybrid"}, "prm": {"fp8": "e4m3"}}
    config = RunConfig.model_validate(smallest | {"precision": formats})
    policy, prm = (
        f"precision.{name}.fp8: found a CPU, wanted a CUDA device; remove it"
        for name in ("policy", "prm")
    )
    assert refused_by(config, "train") == [policy, prm]
    assert refused_by(config, "sft") == [policy]  # it builds no PRM
    assert not dist.is_initialized()


def refused_by(config: RunConfig, command: str) -> list[str]:
    with pytest.raises(ConfigError) as refused, build.training_session(config, ALONE, command):
        pass
    return str(refused.value).splitlines()


@pytest.mark.parametrize(("command", "times"), [("train", 1), ("sft", 1), ("evaluate", 0)])
def test_whose_kernels_a_training_has_is_said_once(
    command: str, times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "examples" / "quickstart"))
    import make_data

    make_data.write_model(tmp_path)
    given = {"run": {"folder": "r"}, "model": {"hf": tmp_path}, "data": {"train": "t"}}
    launch: Any = SimpleNamespace(here=ALONE, store=None)
    with build.training_session(RunConfig.model_validate(given), launch, command):
        pass
    lines = [line for line in capsys.readouterr().out.splitlines() if "kernels: " in line]
    assert len(lines) == times
    if times and not torch.cuda.is_available():
        assert lines == ["kernels: torch's Adam, torch's norms (no CUDA device)"]
