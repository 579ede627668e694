"""Pieces give their bytes back and bring their content, or nothing, back with them."""

from __future__ import annotations

import psutil
import pytest
import torch

from megatron_prime.runtime.memory import Buffer, Kept, Lent, Remade, Slabs, Storages


def pieces_of(kind, tensors):
    return Slabs(tensors) if kind is Lent else Storages(kind, tensors)


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("kind", [Remade, Kept, Lent])
def test_bytes_on_the_device(kind) -> None:
    tensor = torch.randn(300)
    (piece,) = pieces_of(kind, lambda: [tensor])()
    assert piece.nbytes == 1200
    assert piece.held() == (1200, 0)
    copied = piece.put_away()
    piece.free()
    assert copied == (0 if kind is Remade else 1200)
    assert piece.held() == (0, copied)
    piece.allocate()
    assert piece.take_back() == copied
    assert piece.held() == (1200, copied)


def test_memory_of_the_process_falls_and_rises() -> None:
    mib = 2**20
    tensor = torch.ones(64 * mib)  # 256 MiB, all touched
    (piece,) = Storages(Remade, lambda: [tensor])()
    before = resident()
    piece.free()
    assert before - resident() > 250 * mib
    piece.allocate()
    tensor.zero_()
    assert abs(resident() - before) < 6 * mib


def test_views_survive_what_their_storage_goes_through() -> None:
    whole = torch.arange(10.0)
    weight = torch.nn.Parameter(whole[2:5])
    seen = []
    hooked = weight.expand_as(weight).grad_fn.next_functions[0][0]
    hooked.register_hook(lambda *_: seen.append(1))
    (piece,) = Storages(Kept, lambda: [whole, weight])()
    piece.put_away()
    piece.free()
    assert whole.untyped_storage().nbytes() == 0
    piece.allocate()
    piece.take_back()
    assert torch.equal(whole, torch.arange(10.0))
    assert weight.data_ptr() == whole[2:5].data_ptr()
    (2 * weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert seen == [1], "Megatron's DDP hangs on this node"


def test_a_lent_tensor_lives_on_the_host_and_comes_back_with_what_was_written_there() -> None:
    tensor = torch.randn(7, 3)
    before, storage = tensor.clone(), tensor.untyped_storage()
    (piece,) = Slabs(lambda: [tensor])()
    piece.put_away()
    piece.free()
    assert torch.equal(tensor, before)
    assert tensor.untyped_storage()._cdata != storage._cdata
    assert piece.held() == (0, tensor.nbytes)
    tensor[2] = 5.0  # a checkpoint is loaded
    piece.written()
    piece.allocate()
    piece.take_back()
    assert torch.equal(tensor[2], torch.full((3,), 5.0))
    assert piece.put_away() == 0, "the host has it"


@pytest.mark.parametrize("kind", [Kept, Lent])
def test_a_clean_copy_is_not_copied_again(kind) -> None:
    tensor = torch.zeros(8)
    (piece,) = pieces_of(kind, lambda: [tensor])()
    assert piece.put_away() == 32
    assert piece.put_away() == 0
    tensor += 1
    piece.written()
    assert piece.put_away() == 32
    piece.free()
    piece.allocate()
    piece.take_back()
    assert torch.equal(tensor, torch.ones(8))
    assert piece.put_away() == 0


def test_one_piece_per_storage_and_the_same_one_each_time() -> None:
    whole, other = torch.zeros(6), torch.zeros(2)
    tensors = [whole[:3], whole[3:], other]
    pieces = Storages(Remade, lambda: tensors)
    first = pieces()
    assert [piece.nbytes for piece in first] == [24, 8]
    first[1].free()
    assert pieces() == first
    tensors.append(torch.zeros(1))
    assert [*first, pieces()[-1]] == pieces()
    del tensors[:2]
    assert pieces()[0] is first[1]


def test_replaced_tensors_are_let_go() -> None:
    tensors = [torch.ones(32 * 2**20)]
    pieces = Slabs(lambda: tensors)
    pieces()[0].put_away()
    before = resident()
    tensors[0] = torch.zeros(1)
    pieces()
    assert before - resident() > 250 * 2**20  # the tensor and its copy


def test_many_tensors_share_slabs_of_a_size() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 700, 1, 64, 5, 2000, 9)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors[3] = tensors[3].view(8, 8)
    before = [tensor.clone() for tensor in tensors]
    slabs = Slabs(lambda: tensors, slab_bytes=4000)
    pieces = slabs()
    assert [piece.nbytes for piece in pieces] == [4 * (3 + 700 + 1 + 64 + 5), 4 * 2000, 4 * 9]
    for turn in range(2):
        for piece in pieces:
            assert piece.put_away() == piece.nbytes
            piece.free()
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        for piece in pieces:
            piece.allocate()
            for tensor in tensors:
                assert tensor.data_ptr() % 4 == 0
            piece.take_back()
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == 3
        for tensor, old in zip(tensors, before, strict=True):
            tensor += turn + 1
            old += turn + 1
        for piece in pieces:
            piece.written()
    assert slabs() == pieces
    tensors.append(torch.zeros(2))
    assert slabs()[:2] == pieces[:2]


def test_a_buffer_adds_its_pieces_up() -> None:
    tensors = [torch.zeros(4), torch.zeros(6)]
    buffer = Buffer("prm.moments", Slabs(lambda: tensors, slab_bytes=16))
    assert buffer.held() == (40, 0)
    buffer.pieces[0].put_away()
    buffer.pieces[0].free()
    assert buffer.held() == (24, 16)
    tensors.append(torch.zeros(3))
    assert buffer.held() == (36, 16)
