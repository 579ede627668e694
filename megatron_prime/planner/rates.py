"""How fast a GPU computes and moves bytes: what its maker says, and how much of it is achieved.

The peaks are those of the data sheets, without sparsity; links are counted in one direction, which
is half of what data sheets print for NVLink and PCIe. The network is what a node of eight GPUs
usually has, one adapter per GPU. What share of a peak software achieves is not on any data sheet:
the shares here are assumptions. `fp8_share` is such that the pre-training figure which NVIDIA
publishes for Llama 3 8B on H100s comes out (docs/planner.md); no run of this project has confirmed
any of them. Each number can be replaced (`plan.py step --rate NAME=VALUE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_prime.config import ConfigError


@dataclass(frozen=True, slots=True)
class Rates:
    """One GPU and its links; GB are powers of ten, GiB of two."""

    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float  # a chip without FP8 multiplies in bf16
    fp32_tflops: float
    hbm_gb_per_s: float
    nvlink_gb_per_s: float
    pcie_gb_per_s: float
    network_gb_per_s: float
    ranks_per_node: int = 8
    collective_us: float = 10.0  # of a tiny one; generation has two in each layer for each token
    compute_share: float = 0.55  # of the peak, in training's and prefill's kernels
    fp8_share: float = 0.39  # of FP8's peak, casts and scales included
    hbm_share: float = 0.8
    link_share: float = 0.8

    def flops(self, kind: str) -> float:
        """Per second, of `bf16` (fp16 is as fast), `fp8` or `fp32` products."""
        if kind == "fp8" and self.fp8_tflops <= self.bf16_tflops:
            kind = "bf16"
        share = self.fp8_share if kind == "fp8" else self.compute_share
        peak: float = getattr(self, f"{'bf16' if kind == 'fp16' else kind}_tflops")
        return peak * share * 1e12

    @property
    def hbm(self) -> float:
        """Bytes per second."""
        return self.hbm_gb_per_s * self.hbm_share * 1e9

    @property
    def nvlink(self) -> float:
        """Bytes per second."""
        return self.nvlink_gb_per_s * self.link_share * 1e9

    @property
    def pcie(self) -> float:
        """Bytes per second."""
        return self.pcie_gb_per_s * self.link_share * 1e9

    @property
    def network(self) -> float:
        """Bytes per second."""
        return self.network_gb_per_s * self.link_share * 1e9


# Memory: what torch reports as a device's total_memory, rounded down; of an "80 GB" card that is
# about 79.1 GiB. A run's door plans with that number, so this one must not be larger.
# Peaks: NVIDIA's data sheets "A100 80GB" (SXM4), "H100" (SXM5) and "H200" (SXM5).
# Network: 200 Gb/s per GPU in a DGX A100, 400 Gb/s in a DGX H100 or H200 (NVIDIA's user guides).
GPUS = {
    "a100": Rates(
        memory_gib=79,
        bf16_tflops=312,
        fp8_tflops=312,
        fp32_tflops=19.5,
        hbm_gb_per_s=2039,
        nvlink_gb_per_s=300,
        pcie_gb_per_s=32,
        network_gb_per_s=25,
        compute_share=0.6,
    ),
    "h100": Rates(
        memory_gib=79,
        bf16_tflops=989,
        fp8_tflops=1979,
        fp32_tflops=67,
        hbm_gb_per_s=3350,
        nvlink_gb_per_s=450,
        pcie_gb_per_s=64,
        network_gb_per_s=50,
    ),
    "h200": Rates(
        memory_gib=140,
        bf16_tflops=989,
        fp8_tflops=1979,
        fp32_tflops=67,
        hbm_gb_per_s=4800,
        nvlink_gb_per_s=450,
        pcie_gb_per_s=64,
        network_gb_per_s=50,
    ),
}


def rates_of(gpu: str, changes: Sequence[str] = ()) -> Rates:
    """A GPU's rates with `changes`, each NAME=VALUE. Raises ConfigError for one that is none."""
    if gpu not in GPUS:
        raise ConfigError(f"--gpu: found {gpu!r}, wanted one of {', '.join(GPUS)}")
    names = [field.name for field in fields(Rates)]
    found: dict[str, float | int] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if name not in names or not number > 0:
            raise ConfigError(
                f"--rate: found {change!r}, wanted NAME=NUMBER above 0 with one of the names "
                f"{', '.join(names)}"
            )
        found[name] = int(number) if name == "ranks_per_node" else number
    return replace(GPUS[gpu], **found)  # type: ignore[arg-type]
