"""What the composition root refuses before any process group starts."""

from __future__ import annotations

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
