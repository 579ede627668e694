"""Which fused kernels a run says that it has."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
from megatron_prime.models import kernels  # noqa: E402


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages could be imported, and no other."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: name if name in names else None)


def adam_of(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As if Megatron had imported its Adam from there."""
    theirs = type("FusedAdam", (), {"__module__": module})
    monkeypatch.setattr(kernels.megatron_optimizer, "Adam", theirs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's line")
def test_on_a_cpu_everything_is_torchs() -> None:
    assert kernels.kernels_line() == "kernels: torch's Adam, torch's norms (no CUDA device)"


@pytest.mark.usefixtures("on_a_gpu")
class TestOnAGpu:
    def test_transformer_engine_is_fused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        installed(monkeypatch, "transformer_engine")
        adam_of(monkeypatch, "transformer_engine.pytorch.optimizers.fused_adam")
        assert kernels.kernels_line() == (
            "kernels: Transformer Engine's Adam, Transformer Engine's norms"
        )

    def test_plain_layers_have_torchs_norms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        installed(monkeypatch, "transformer_engine")
        adam_of(monkeypatch, "transformer_engine.pytorch.optimizers.fused_adam")
        line = kernels.kernels_line({"transformer_impl": "local"})
        assert line.startswith("kernels: Transformer Engine's Adam, torch's norms; ")
        assert 'megatron.transformer_impl = "local"' in line

    def test_apex_has_an_adam(self, monkeypatch: pytest.MonkeyPatch) -> None:
        installed(monkeypatch, "apex")
        adam_of(monkeypatch, "apex.optimizers.fused_adam")
        assert kernels.kernels_line({"transformer_impl": "local"}) == (
            "kernels: apex's Adam, torch's norms; Transformer Engine, which is not installed, "
            "has fused ones"
        )

    def test_without_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        installed(monkeypatch)
        adam_of(monkeypatch, "torch.optim.adamw")
        assert "torch's Adam, torch's norms; Transformer Engine, which is not installed" in (
            kernels.kernels_line({"transformer_impl": "local"})
        )
