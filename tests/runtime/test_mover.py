"""Exactly the difference moves, in an order that the budget allows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_prime.runtime.memory import Buffer, Remade, Slabs, Storages
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
            Buffer(f"{self.owner}.gradients", Storages(Remade, lambda: self.gradients)),
            Buffer(f"{self.owner}.moments", Slabs(lambda: self.moments)),
            Buffer(f"{self.owner}.weights", Storages(Remade, lambda: self.weights), remake),
            Buffer(f"{self.owner}.masters", Slabs(lambda: self.masters)),
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
    assert len(held) == 5, "four pieces, and the remake"
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
    with pytest.raises(BudgetExceeded, match=r"no room for policy.moments: 200 .* 500 .*650"):
        mover.switch(names("policy", *ALL))


def test_moments_that_come_late_and_buffers_of_others() -> None:
    model, told = Model("policy"), []
    late, model.moments = model.moments, []
    mover = mover_of(model)
    mover.add(
        Buffer("engine.weights", Storages(Remade, lambda: [whole]), left=lambda: told.append(1))
    )
    whole = torch.zeros(N)
    mover.switch(frozenset())
    assert told == [1]
    mover.switch(names("policy", *ALL))
    model.moments = late  # the first step
    mover.switch(frozenset())
    assert mover.moved.to_host == 400
    assert told == [1], "it was away already"


@pytest.mark.parametrize("budget", [None, 400])
def test_others_memory_leaves_first_and_comes_when_all_of_ours_has_left(budget) -> None:
    order = []

    class Told(Remade):
        def free(self):
            order.append(("free", self.nbytes))
            super().free()

        def allocate(self):
            order.append(("allocate", self.nbytes))
            super().allocate()

    mine = [torch.zeros(1), torch.zeros(2), torch.zeros(4)]
    theirs = torch.zeros(3)
    mover = Mover(budget, CPU)
    mover.add(Buffer("policy.gradients", Storages(Told, lambda: mine[:2])))
    mover.add(Buffer("prm.gradients", Storages(Told, lambda: mine[2:])))
    mover.add(Buffer("engine.kv_cache", Storages(Told, lambda: [theirs]), collective=True))
    mover.switch(frozenset({"policy.gradients"}))
    assert order == [("free", 12), ("free", 16)]
    order.clear()
    mover.switch(frozenset({"prm.gradients", "engine.kv_cache"}))
    assert order[-1] == ("allocate", 12)
    assert sorted(order[:-1]) == [("allocate", 16), ("free", 4), ("free", 8)]


def test_without_a_budget_what_leaves_goes_before_anything_comes() -> None:
    held = []
    policy, prm = Model("policy"), Model("prm")
    mover = mover_of(policy, prm)
    mover.switch(names("policy", *ALL))
    for piece in (piece for buffer in mover.buffers.values() for piece in buffer.pieces):
        watch_allocations(piece, lambda: held.append(mover.on_device()))
    mover.switch(names("prm", *ALL))
    assert held[-1] == max(held) == 700, "never more than the one that comes"


class FakeStream:
    """Notes what a mover on a GPU asks of its streams, in the order of the host."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def record_event(self):
        self.events += 1
        return FakeEvent(self.events, self.log)

    def synchronize(self):
        self.log.append(("host waits for", self.name))

    def __enter__(self):
        self.log.append(("on", self.name))

    def __exit__(self, *_):
        pass


class FakeEvent:
    def __init__(self, number, log):
        self.number, self.log = number, log

    def synchronize(self):
        self.log.append(("host waits for copy", self.number))


def test_on_a_gpu_copies_end_before_memory_is_freed_and_servers_find_it_at_the_driver(
    monkeypatch,
) -> None:
    log = []

    class Logged(Slabs):
        """Its one piece tells the log what is done to it."""

        def __call__(self):
            (piece,) = super().__call__()
            if not hasattr(piece, "is_watched"):
                piece.is_watched = True
                for what in ("free", "allocate", "take_back"):
                    setattr(piece, what, partial(self.told, what, getattr(piece, what)))
            return [piece]

        @staticmethod
        def told(what, real):
            log.append(what)
            return real()

    main = FakeStream("main", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("host waits for all"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty cache"))
    moments = {"policy": [torch.zeros(N)], "prm": [torch.zeros(N)]}
    mover = Mover(None, CPU)
    mover._out, mover._in = FakeStream("out", log), FakeStream("in", log)
    mover.add(Buffer("policy.moments", Logged(lambda: moments["policy"])))
    mover.add(Buffer("prm.moments", Logged(lambda: moments["prm"])))
    server = torch.zeros(0)
    of_server = Storages(Remade, lambda: [server])
    mover.add(
        Buffer("engine.kv_cache", of_server, left=partial(log.append, "left"), collective=True)
    )
    mover.switch(names("policy", "moments"))
    mover.written(names("policy", "moments"))
    log.clear()
    mover.switch(names("prm", "moments") | {"engine.kv_cache"})
    ours = [("host waits for copy", 2), "free", ("in", "waits for", "main"), ("on", "in")]
    assert log[:2] == [("out", "waits for", "main"), ("on", "out")]
    assert log[2:8] == [*ours[:2], "allocate", *ours[2:], "take_back"]
    assert log[8:11] == [("host waits for", "in"), "host waits for all", "empty cache"]
    assert log[11] == ("in", "waits for", "main"), "only now the server's memory comes"
