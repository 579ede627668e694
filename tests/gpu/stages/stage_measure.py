"""Seconds, bytes and model FLOPs of work on one device; on a CPU the same calls with its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from stage_sizes import chip_rates

from megatron_prime.planner.flops import Load, forward_flops
from megatron_prime.types import RolloutBatch
from megatron_prime.weights.shape import ModelShape

GIB = 2**30


def settled() -> float:
    """The clock, when the device has done all it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], warm_up: int = 1, repeat: int = 3) -> float:
    """Median of a few repetitions."""
    found = []
    for turn in range(warm_up + repeat):
        started = settled()
        work()
        if turn >= warm_up:
            found.append(settled() - started)
    return median(found)


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator has given out during `work`; 0 without CUDA."""
    if not torch.cuda.is_available():
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def device_used() -> int:
    """Bytes that the driver says are taken, by all processes; 0 without CUDA."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def device() -> torch.device:
    """Where tensors of a stage lie."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_of(batch: RolloutBatch) -> Load:
    """The work that is in a batch, to the token."""
    lengths = [len(sequence.token_ids) for sequence in batch.sequences]
    return Load(
        tokens=float(sum(lengths)),
        seen_keys=sum(length * (length + 1) / 2 for length in lengths),
        wanted=float(batch.response_mask.sum()),
    )


def utilisation(shape: ModelShape, batch: RolloutBatch, forwards: int, seconds: float) -> float:
    """Model FLOPs of `forwards` forward passes (a backward pass is two) over what the chip's data
    sheet says it could have done in bf16; recomputation does not count. 0 for an unknown chip."""
    rates = chip_rates()
    if rates is None:
        return 0.0
    flops = forwards * forward_flops(shape, load_of(batch)).all
    return flops / seconds / (rates.bf16_tflops * 1e12)


def copy_seconds(nbytes: int, repeat: int = 3) -> float:
    """Of one copy within the device."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), repeat=repeat)
