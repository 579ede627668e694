"""Exactly the difference moves, in an order that the budget allows."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.runtime.memory import Buffer, Lent, Pieces, Remade
from megatron_prime.runtime.mover import BudgetExceeded, Mover

CPU = torch.device("cpu")
N = 25  # values of each tensor: 100 bytes


class Model:
    """Two tensors of masters and of moments, one of weights that are their sum."""

    def __init__(self, owner, watch=lambda: None):
        self.owner, self.watch = owner, watch
        self.masters = [torch.full((N,), 1.0), torch.full((N,), 2.0)]
        self.moments = [torch.full((N,), 3.0), torch.full((N,), 4.0)]
        self.gradients, self.weights = [torch.zeros(2 * N)], [torch.full((N,), 3.0)]
        self.remade = 0

    def buffers(self):
        def remake():
            self.weights[0].copy_(self.masters[0] + self.masters[1])
            self.remade += 1
            self.watch()

        return [
            Buffer(f"{self.owner}.gradients", Pieces(Remade, lambda: self.gradients)),
            Buffer(f"{self.owner}.moments", Pieces(Lent, lambda: self.moments)),
            Buffer(f"{self.owner}.weights", Pieces(Remade, lambda: self.weights), remake),
            Buffer(f"{self.owner}.masters", Pieces(Lent, lambda: self.masters)),
        ]


def names(owner, *kinds):
    return frozenset(f"{owner}.{kind}" for kind in kinds)


ALL = ("gradients", "moments", "weights", "masters")


def mover_of(*models, budget=None):
    mover = Mover(budget, CPU)
    for model in models:
        for buffer in model.buffers():
            mover.add(buffer)
    return mover


def test_nothing_moves_when_all_is_there() -> None:
    model = Model("policy")
    mover = mover_of(model)
    mover.switch(names("policy", *ALL) | {"engine.weights"})
    assert (mover.moved.to_host, mover.moved.to_device, model.remade) == (0, 0, 0)


def test_leaves_and_comes_back_as_it_was() -> None:
    model = Model("policy")
    mover = mover_of(model)
    mover.switch(frozenset())
    assert mover.on_device() == 0
    assert mover.moved.to_host == 400, "masters and moments; nothing else is worth a copy"
    mover.switch(names("policy", *ALL))
    assert mover.on_device() == 700
    assert mover.moved.to_device == 400
    assert model.remade == 1
    assert torch.equal(model.weights[0], torch.full((N,), 3.0))
    assert torch.equal(model.moments[1], torch.full((N,), 4.0))


def test_what_nobody_wrote_to_is_not_copied_again() -> None:
    mover = mover_of(Model("policy"))
    for _ in range(3):
        mover.switch(frozenset())
        mover.switch(names("policy", *ALL))
    assert mover.moved.to_host == 400
    mover.written(names("policy", "moments"))
    mover.switch(frozenset())
    assert mover.moved.to_host == 600


def test_borrows_masters_to_make_weights() -> None:
    model = Model("policy")
    mover = mover_of(model)
    mover.switch(frozenset())
    model.masters[0][0] = 10.0  # on the host
    mover.switch(names("policy", "weights"))
    assert mover.present == names("policy", "weights")
    assert mover.on_device() == 100
    assert mover.moved.to_device == 200
    assert mover.moved.to_host == 400, "borrowed masters go back without a copy"
    assert model.weights[0][:2].tolist() == [12.0, 3.0]


def test_two_models_change_places_within_a_budget_that_holds_one_and_a_bit() -> None:
    held = []
    policy = Model("policy")
    prm = Model("prm", watch=lambda: held.append(mover.on_device()))
    mover = mover_of(policy, prm, budget=800)
    mover.switch(names("policy", *ALL))
    before = mover.moved.to_host
    for allocate in (piece for buffer in mover.buffers.values() for piece in buffer.pieces):
        watch_allocations(allocate, lambda: held.append(mover.on_device()))
    mover.switch(names("prm", *ALL))
    assert mover.present == names("prm", *ALL)
    assert mover.moved.to_host - before == 400
    assert max(held) <= 800
    assert len(held) > 5
    assert prm.remade == 1


def watch_allocations(piece, told):
    allocate = piece.allocate

    def watched():
        allocate()
        told()

    piece.allocate = watched


def test_no_room_names_the_buffer_and_the_bytes() -> None:
    mover = mover_of(Model("policy"), budget=650)
    mover.switch(frozenset())
    with pytest.raises(BudgetExceeded, match=r"no room for policy.gradients: 200 .* 500 .*650"):
        mover.switch(names("policy", *ALL))


def test_moments_that_come_late_and_buffers_of_others() -> None:
    model, told = Model("policy"), []
    late, model.moments = model.moments, []
    mover = mover_of(model)
    mover.add(
        Buffer("engine.weights", Pieces(Remade, lambda: [whole]), left=lambda: told.append(1))
    )
    whole = torch.zeros(N)
    mover.switch(frozenset())
    assert told == [1]
    mover.switch(names("policy", *ALL))
    model.moments = late  # the first step
    mover.switch(frozenset())
    assert mover.moved.to_host == 400
    assert told == [1], "it was away already"


def test_others_memory_leaves_first_and_arrives_last() -> None:
    order = []

    class Told(Remade):
        def free(self):
            order.append(("free", self.nbytes))
            super().free()

        def allocate(self):
            order.append(("allocate", self.nbytes))
            super().allocate()

    mine, theirs = torch.zeros(1), torch.zeros(2)
    mover = Mover(None, CPU)
    mover.add(Buffer("policy.gradients", Pieces(Told, lambda: [mine])))
    mover.add(Buffer("engine.kv_cache", Pieces(Told, lambda: [theirs]), collective=True))
    mover.switch(frozenset())
    mover.switch(frozenset(mover.buffers))
    assert order == [("free", 8), ("free", 4), ("allocate", 4), ("allocate", 8)]
