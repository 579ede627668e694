"""The CPU stands in for CUDA where Megatron asks, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from megatron_prime.runtime.compat import (
    before_megatron_import,
    check_apex,
    check_megatron_version,
    install_cpu_shim,
    megatron_calls,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for CPUs")


def test_unchecked_version_is_refused() -> None:
    check_megatron_version("0.16.1")
    with pytest.raises(RuntimeError, match=r"found megatron-core 0\.17\.0; .* 0\.16\.1 only"):
        check_megatron_version("0.17.0")


def test_cuda_literals_mean_the_cpu_inside_only() -> None:
    with megatron_calls():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.tensor([1], device="cuda:0", pin_memory=True).device.type == "cpu"
        assert torch.empty_like(torch.ones(1), device=torch.device("cuda")).device.type == "cpu"
        tensor = torch.ones(1)
        assert tensor.cuda() is tensor
        assert torch.ones(1, device="meta").device.type == "meta"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_only_the_optimizer_hears_cuda_types() -> None:
    tensor = torch.ones(1, dtype=torch.bfloat16)
    asker = {"__name__": "megatron.core.optimizer.optimizer", "tensor": tensor}
    with megatron_calls():
        assert eval("tensor.type()", asker) == "torch.cuda.BFloat16Tensor"
        assert tensor.type() == "torch.BFloat16Tensor"
        assert tensor.type(torch.float32).dtype == torch.float32


def test_random_state_is_the_cpus() -> None:
    install_cpu_shim()
    install_cpu_shim()  # the second time does nothing
    assert torch.device(torch.cuda.current_device()).type == "cpu"
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_only_the_known_warnings_are_silent() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before_megatron_import()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back", stacklevel=1)
        warnings.warn("something else about Apex", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something else about Apex"]


def test_a_start_loads_no_compiler() -> None:
    """It would be a third of the start. What Megatron does not compile gives the same numbers."""
    script = """
import sys, torch
from megatron_prime.runtime.compat import before_megatron_import
compiler = torch.compile
before_megatron_import()
import megatron_prime.build
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert torch.compile is compiler
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
x = torch.linspace(-2, 2, 6)
print(torch.equal(swiglu(x), torch.nn.functional.silu(x[:3]) * x[3:]))
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert found.stdout.splitlines() == ["[]", "True"], found.stderr


def test_an_apex_without_nvidias_kernels_is_refused() -> None:
    check_apex(found=False, has_kernels=False)
    check_apex(found=True, has_kernels=True)
    with pytest.raises(RuntimeError, match="the apex on PyPI is something else; pip uninstall"):
        check_apex(found=True, has_kernels=False)
