"""What a bucket is filled with; whole models are gathered in tests/distributed/."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
gather = pytest.importorskip("megatron_prime.weights.gather")


class Quantized:
    """Stands for Transformer Engine's FP8 tensors: its values are `codes` times `scale`."""

    def __init__(self, codes: torch.Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scale


def test_fp8_weights_are_gathered_as_theirvalues_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "is_float8tensor", lambda tensor: isinstance(tensor, Quantized))
    monkeypatch.setattr(gather, "dequantize_fp8_tensor", lambda tensor: tensor.dequantize())
    weight: Any = Quantized(torch.tensor([1.0, -1.75, 448.0]).to(torch.float8_e4m3fn), 0.5)
    assert torch.equal(gather.values_of(weight), torch.tensor([0.5, -0.875, 224.0]))
    plain = torch.randn(3)
    assert gather.values_of(plain) is plain
