"""What runs inside SGLang's processes, fed by a trainer's side of the hand-over."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import torch

from megatron_prime.rollout import weight_loader
from megatron_prime.weights.checksum import checksum
from megatron_prime.weights.handover import Handover, HandoverError, HandoverLayout, Placed

CPU = torch.device("cpu")
DTYPES = {"qkv.weight": "float32", "norm.weight": "bfloat16", "scales": "float8_e4m3fn"}
SIZES = {"qkv.weight": [6, 4], "norm.weight": [5], "scales": [3, 3]}
ROUNDS = [  # columns, rows, a vector; row 5 of qkv.weight belongs to nobody
    [
        Placed("qkv.weight", [[0, 5], [0, 2]], 0, "float32"),
        Placed("norm.weight", [[0, 5]], 48, "bfloat16"),
    ],
    [Placed("qkv.weight", [[0, 2], [2, 4]], 16, "float32")],
    [
        Placed("scales", [[0, 3], [0, 3]], 0, "float8_e4m3fn"),
        Placed("qkv.weight", [[2, 5], [2, 4]], 32, "float32"),
    ],
]
LAYOUT = HandoverLayout(SIZES, DTYPES, ROUNDS, 64, timeout_s=10.0)


class Model(torch.nn.Module):
    """Live parameters, full of rubbish."""

    def __init__(self, sizes: dict[str, list[int]], dtypes: dict[str, str]) -> None:
        super().__init__()
        self.held = {
            name: torch.nn.Parameter(
                torch.full(size, 7.0).to(getattr(torch, dtypes[name])), requires_grad=False
            )
            for name, size in sizes.items()
        }

    def named_parameters(self, *_, **__):
        return iter(self.held.items())


@pytest.fixture
def trainer() -> Iterator[Handover]:
    weight_loader._open.clear()
    yield Handover.create(LAYOUT, CPU)
    weight_loader._open.clear()


@pytest.fixture
def model() -> Model:
    return Model(SIZES, DTYPES)


def start(model: Model, trainer: Handover, sync: int) -> threading.Thread:
    request = json.dumps({"ticket": trainer.ticket, "sync": sync})
    thread = threading.Thread(target=weight_loader.load, args=(model, [(request, torch.zeros(1))]))
    thread.start()
    return thread


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator).to(getattr(torch, DTYPES[name]))
        for name, size in SIZES.items()
    }


def sync(model: Model, trainer: Handover, number: int) -> tuple[list[int], list[int]]:
    """Checksums of what was sent, and of what the loader found in the parameters."""
    sent = []
    trainer.begin(number)
    thread = start(model, trainer, number)
    for round_, pieces in enumerate(ROUNDS):
        trainer.wait_free(round_, 10, thread.is_alive)
        for piece in pieces:
            part = weights(number)[piece.parameter][tuple(slice(*b) for b in piece.region)]
            raw = part.contiguous().flatten().view(torch.uint8)
            trainer.buffers[round_ % 2][piece.offset : piece.offset + len(raw)] = raw
            sent.append(int(checksum(part)))
        trainer.publish(round_)
    found = trainer.wait_done(10, thread.is_alive)
    thread.join()
    return sent, found


def test_every_piece_lands_where_it_belongs(model: Model, trainer: Handover) -> None:
    for number in (1, 2):
        sent, found = sync(model, trainer, number)
        assert found == sent
        for name, wanted in weights(number).items():
            if name == "qkv.weight":
                wanted[5] = 0  # rows without a piece, such as a padded vocabulary's, are zero
            assert torch.equal(model.held[name].float(), wanted.float()), name


def test_the_memory_is_opened_once_for_all_syncs(
    model: Model, trainer: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(model, trainer, 1)
    monkeypatch.setattr(Handover, "open", lambda *_: pytest.fail("opened again"))
    sync(model, trainer, 2)


def test_a_restarted_trainer_is_followed(model: Model, trainer: Handover) -> None:
    sync(model, trainer, 1)
    other = Handover.create(LAYOUT, CPU)
    sent, found = sync(model, other, 1)
    assert found == sent
    assert list(weight_loader._open) == [other.ticket]


def test_checksums_are_of_the_parameters_not_of_the_buffer(
    model: Model, trainer: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that does not keep what was written to it is told."""
    sync(model, trainer, 1)
    loaded = Handover.loaded

    def fault(handover: Handover, round_: int) -> None:
        if round_ == 2:
            model.held["qkv.weight"].data[3, 2] += 1
        loaded(handover, round_)

    monkeypatch.setattr(Handover, "loaded", fault)
    sent, found = sync(model, trainer, 2)
    assert [a == b for a, b in zip(sent, found, strict=True)] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": ([6], "bfloat16")}, r"norm\.weight: found \[6\], the plan has \[5\]"),
        ({"norm.weight": None}, r"norm\.weight: found None, the plan has \[5\]"),
        ({"rotary.weight": ([2], "float32")}, r"rotary\.weight: found \[2\], the plan has None"),
        ({"norm.weight": ([5], "float32")}, r"norm\.weight: found torch\.float32, .*bfloat16"),
    ],
    ids=["size", "missing", "unknown", "type"],
)
def test_a_model_that_differs_from_the_plan_is_refused(change, message, trainer) -> None:
    described = {name: (size, DTYPES[name]) for name, size in SIZES.items()} | change
    described = {name: found for name, found in described.items() if found}
    model = Model(
        {name: size for name, (size, _) in described.items()},
        {name: dtype for name, (_, dtype) in described.items()},
    )
    trainer.begin(1)
    start(model, trainer, 1).join()
    with pytest.raises(HandoverError, match=message):
        trainer.wait_done(5, lambda: True)


def test_a_failure_in_the_middle_is_told_with_its_place(
    model: Model, trainer: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(weight_loader, "checksum", broken)
    trainer.begin(1)
    trainer.publish(0)
    start(model, trainer, 1).join()  # and the scheduler lives on
    with pytest.raises(HandoverError, match=r"(?s)weight_loader\.py.*no memory left"):
        trainer.wait_done(5, lambda: True)


def test_a_sync_that_is_given_up_ends_the_load(model: Model, trainer: Handover) -> None:
    trainer.begin(1)
    thread = start(model, trainer, 1)
    trainer.publish(0)
    trainer.give_up()
    thread.join(10)
    assert not thread.is_alive()
    sent, found = sync(model, trainer, 2)  # the next one is whole
    assert found == sent
