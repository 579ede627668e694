"""Buffers leave a real device and come back: values, bytes of the allocator, page-locked copies."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.runtime.memory import Buffer, Kept, Lent, Remade, Slabs, Storages
from megatron_prime.runtime.mover import BudgetExceeded, Mover

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIB = 2**20
N = 16 * MIB  # values of each tensor: 64 MiB


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    names = ("policy.moments", "prm.moments", "reference.weights", "policy.gradients")
    return {name: torch.randn(N, generator=generator, device="cuda") for name in names}


KINDS = {
    "policy.moments": Lent,
    "prm.moments": Lent,
    "reference.weights": Kept,
    "policy.gradients": Remade,
}


def pieces_of(kind, tensor):
    return Slabs(lambda: [tensor]) if kind is Lent else Storages(kind, lambda: [tensor])


def mover_of(held: dict[str, torch.Tensor], budget: int | None) -> Mover:
    mover = Mover(budget, torch.device("cuda", torch.cuda.current_device()))
    for name, tensor in held.items():
        mover.add(Buffer(name, pieces_of(KINDS[name], tensor)))
    return mover


def test_freed_means_freed_and_values_come_back() -> None:
    held = tensors()
    before = {name: tensor.clone() for name, tensor in held.items()}
    mover, allocated = mover_of(held, None), torch.cuda.memory_allocated()
    mover.switch(frozenset())
    assert allocated - torch.cuda.memory_allocated() >= 4 * N * 4
    assert held["policy.moments"].device.type == "cpu"
    assert held["policy.moments"].is_pinned()
    assert torch.equal(held["policy.moments"], before["policy.moments"].cpu())
    mover.switch(frozenset(held))
    assert torch.cuda.memory_allocated() == allocated
    for name in ("policy.moments", "prm.moments", "reference.weights"):
        assert torch.equal(held[name], before[name])


def test_work_that_is_queued_before_and_after_a_switch_sees_the_right_values() -> None:
    held = tensors()
    mover = mover_of(held, 3 * 4 * N)
    mover.switch(frozenset({"policy.moments", "reference.weights"}))
    expected = held["policy.moments"].double()
    for _ in range(20):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(10):
            busy = busy @ busy / 64.0
        held["policy.moments"].add_(1.0)  # behind a long queue
        mover.written(frozenset({"policy.moments"}))
        mover.switch(frozenset({"prm.moments", "reference.weights"}))
        held["prm.moments"].mul_(1.0)
        mover.switch(frozenset({"policy.moments", "reference.weights"}))
        expected += 1.0
    assert torch.allclose(held["policy.moments"].double(), expected, atol=1e-4)


def test_the_budget_holds_while_two_change_places() -> None:
    held = tensors()
    mover = mover_of(held, 2 * 4 * N)
    mover.switch(frozenset({"policy.moments"}))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mover.switch(frozenset({"prm.moments"}))
    assert torch.cuda.max_memory_allocated() - before <= 4 * N
    with pytest.raises(BudgetExceeded, match="no room for"):
        mover.switch(frozenset(held))
