"""A parameter's value; whole checkpoints are loaded in tests/distributed/."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
load = pytest.importorskip("megatron_prime.weights.load")


@torch.no_grad()
def test_the_value_kept_for_the_masters_follows_the_parameter() -> None:
    """Transformer Engine keeps an FP8 parameter's first value for the optimizer's fp32 copy."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    value = torch.randn(2, 3)
    load.fill(parameter, value)
    assert torch.equal(parameter, value.bfloat16())
    assert not hasattr(parameter, "_high_precision_init_val")
    parameter._high_precision_init_val = torch.ones(2, 3, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    load.fill(parameter, value)
    assert torch.equal(parameter._high_precision_init_val, value.bfloat16())  # type: ignore[attr-defined]
