"""Rates: what the data sheets say to each other, and how a user replaces them."""

from __future__ import annotations

import pytest

from megatron_prime.config import ConfigError
from megatron_prime.planner.rates import GPUS, rates_of


def test_an_h200_is_an_h100_with_more_and_faster_memory() -> None:
    h100, h200 = GPUS["h100"], GPUS["h200"]
    assert h200.hbm_gb_per_s / h100.hbm_gb_per_s == pytest.approx(1.43, abs=0.01)
    assert h200.flops("bf16") == h100.flops("bf16")
    assert h100.flops("bf16") < h100.flops("fp8") < 2 * h100.flops("bf16")


def test_no_card_is_taken_for_larger_than_torch_says() -> None:
    """total_memory of an "80 GB" card is about 79.1 GiB."""
    assert GPUS["a100"].memory_gib == GPUS["h100"].memory_gib == 79


def test_a_chip_without_fp8_multiplies_in_bf16() -> None:
    assert GPUS["a100"].flops("fp8") == GPUS["a100"].flops("bf16") == 312e12 * 0.6


def test_links_achieve_a_share() -> None:
    found = rates_of("h100", ["pcie_gb_per_s=50", "link_share=0.5"])
    assert found.pcie == 25e9
    assert found.network == 25e9
    assert found.nvlink == 225e9


@pytest.mark.parametrize("change", ["pcie=50", "pcie_gb_per_s", "hbm_share=0", "hbm_share=fast"])
def test_a_wrong_change_is_refused_with_the_names(change: str) -> None:
    with pytest.raises(ConfigError, match=f"--rate: found '{change}'.*pcie_gb_per_s"):
        rates_of("h100", [change])


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpu: found 'v100', wanted one of a100, h100, h200"):
        rates_of("v100")
