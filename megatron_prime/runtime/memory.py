"""Buffers that can leave a device, and come back as they were.

A buffer is what one owner holds of one kind: `policy.moments`, `reference.weights`. It consists of
pieces, each a tensor's storage, and each kind of piece has its own way to be away:

- `Remade`: the bytes are given back and forgotten: gradients, which each step begins at zero, and
  16-bit weights, which are made again from the fp32 masters by `Buffer.remake`, bit for bit;
- `Kept`: the bytes wait in host memory and every view of them stays what it is: reference weights
  (whose host copy never ages, so that sending them away is free), and weights in fp32;
- `Lent`: the tensors themselves live on the host meanwhile, so that a checkpoint can read and write
  them there: masters and moments.

Host memory is page-locked on a GPU's machine, of exactly the size needed, allocated once and kept:
locking pages takes longer than copying them. A host copy is good until somebody writes to the
buffer on the device (`written`); sending a clean buffer away copies nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

SLAB = 256 * 2**20  # bytes
ALIGNED = 64  # bytes; where a tensor may begin in a slab
PAGE = 4096


class Piece(Protocol):
    """One storage. `put_away` and `take_back` only start copies: the caller waits, then frees."""

    @property
    def nbytes(self) -> int:
        """Of the device, while it is there."""

    def put_away(self) -> int:
        """Start the copy to the host; bytes copied."""

    def free(self) -> None:
        """Give the device's bytes back."""

    def allocate(self) -> None:
        """Take bytes of the device."""

    def take_back(self) -> int:
        """Start the copy to the device; bytes copied."""

    def written(self) -> None:
        """The host copy, if there is one, is old now."""

    def held(self) -> tuple[int, int]:
        """Bytes on the device and on the host, as they are now."""


class Remade:
    """A storage whose content is not kept."""

    def __init__(self, tensor: Tensor) -> None:
        """Of all that shares the storage of `tensor`."""
        self._storage = tensor.untyped_storage()
        self.nbytes = self._storage.nbytes()

    def put_away(self) -> int:
        """Nothing is copied."""
        return 0

    def free(self) -> None:
        """All views stay, and must not be read."""
        self._storage.resize_(0)

    def allocate(self) -> None:
        """Views are good again; their content is anything."""
        self._storage.resize_(self.nbytes)

    def take_back(self) -> int:
        """Nothing is copied."""
        return 0

    def written(self) -> None:
        """There is no copy."""

    def held(self) -> tuple[int, int]:
        """Bytes on device and host."""
        return self._storage.nbytes(), 0


class Kept(Remade):
    """A storage whose content waits on the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Of all that shares the storage of `tensor`."""
        super().__init__(tensor)
        self._bytes = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(self._storage)
        self._host: Tensor | None = None
        self._good = False  # whether the host has what the device has

    def put_away(self) -> int:
        """Start the copy, unless the host has it."""
        if self._good:
            return 0
        if self._host is None:
            self._host = host_bytes(self.nbytes, self._bytes.device)
        self._host.copy_(self._bytes, non_blocking=True)
        self._good = True
        return self.nbytes

    def take_back(self) -> int:
        """Start the copy."""
        assert self._host is not None, "put_away comes first"
        self._bytes.copy_(self._host, non_blocking=True)
        return self.nbytes

    def written(self) -> None:
        """The host copy is old now."""
        self._good = False

    def held(self) -> tuple[int, int]:
        """Bytes on device and host."""
        return self._storage.nbytes(), 0 if self._host is None else self._host.nbytes


class Lent:
    """Tensors that nobody has views of and that live on the host while they are away.

    From the first time on they lie in one slab, on the device as on the host: hundreds of small
    allocations would cut its free memory to pieces, and as many small copies are slow.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Of one type, on one device."""
        self._tensors = list(tensors)
        self._device = tensors[0].device
        self._places, self._end = _places(tensors)
        self._slab: Tensor | None = None  # on the device, once they lie in one
        self._host: Tensor | None = None
        self._good = self._away = False
        self.nbytes = sum(tensor.nbytes for tensor in tensors)

    def put_away(self) -> int:
        """Start the copy, unless the host has it."""
        if self._good:
            return 0
        if self._host is None:
            self._host = host_bytes(self._end, self._device)
        if self._slab is not None:
            self._host.copy_(self._slab, non_blocking=True)
        else:
            for tensor, view in zip(self._tensors, self._views(self._host), strict=True):
                view.copy_(tensor, non_blocking=True)
        self._good = True
        return self.nbytes

    def free(self) -> None:
        """From now on the tensors are the host copy: what is written to them counts."""
        assert self._host is not None, "put_away comes first"
        self._point_to(self._host)
        self._slab, self._away = None, True

    def allocate(self) -> None:
        """On the device; the content is anything until `take_back`."""
        self._slab = torch.empty(self._end, dtype=torch.uint8, device=self._device)
        self._point_to(self._slab)
        self._away = False

    def take_back(self) -> int:
        """Start the copy."""
        assert self._host is not None, "put_away comes first"
        assert self._slab is not None, "allocate comes first"
        self._slab.copy_(self._host, non_blocking=True)
        return self.nbytes

    def written(self) -> None:
        """The host copy is old now."""
        self._good = self._away

    def held(self) -> tuple[int, int]:
        """Bytes on device and host."""
        return 0 if self._away else self.nbytes, 0 if self._host is None else self.nbytes

    def _views(self, slab: Tensor) -> Iterator[Tensor]:
        for tensor, (start, end) in zip(self._tensors, self._places, strict=True):
            yield slab[start:end].view(tensor.dtype).view(tensor.shape)

    def _point_to(self, slab: Tensor) -> None:
        for tensor, view in zip(self._tensors, self._views(slab), strict=True):
            tensor.data = view


class Buffer:
    """What an owner holds of one kind."""

    def __init__(
        self,
        name: str,
        pieces: Callable[[], Sequence[Piece]],
        remake: Callable[[], None] | None = None,
        left: Callable[[], None] | None = None,
        collective: bool = False,
    ) -> None:
        """`pieces` is asked whenever something has to move: Adam makes its moments late.

        `remake` fills what `allocate` brought; `left` is called when all pieces are away.
        `collective`: they wait for other ranks, so all ranks move them in the same order.
        """
        self.name, self.remake, self.left, self.collective = name, remake, left, collective
        self._pieces = pieces

    @property
    def pieces(self) -> Sequence[Piece]:
        """As they are now."""
        return self._pieces()

    def held(self) -> tuple[int, int]:
        """Bytes on the device and on the host."""
        found = [piece.held() for piece in self.pieces]
        return sum(device for device, _ in found), sum(host for _, host in found)

    def written(self) -> None:
        """Somebody changed it on the device."""
        for piece in self.pieces:
            piece.written()


class Storages:
    """A piece for each storage of tensors; each is made once."""

    def __init__(self, kind: type[Remade], tensors: Callable[[], Iterable[Tensor]]) -> None:
        """`kind` is made of any tensor that lies in the storage."""
        self._kind, self._tensors = kind, tensors
        self._made: dict[int, Piece] = {}

    def __call__(self) -> list[Piece]:
        """In the order of the tensors."""
        found: dict[int, Piece] = {}
        for tensor in self._tensors():
            key = tensor.untyped_storage()._cdata  # the piece keeps it alive, so it stays its own
            found[key] = self._made.get(key) or self._kind(tensor)
        self._made = found
        return list(found.values())


class Slabs:
    """`Lent` pieces for tensors that may come late or be replaced; each is made once."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], slab_bytes: int = SLAB) -> None:
        """A piece holds `slab_bytes`, or one tensor if that is larger."""
        self._tensors, self._slab_bytes = tensors, slab_bytes
        self._made: dict[tuple[int, ...], Lent] = {}

    def __call__(self) -> list[Piece]:
        """In the order of the tensors."""
        found: dict[tuple[int, ...], Lent] = {}
        for group in self._groups():
            key = tuple(map(id, group))
            found[key] = self._made.get(key) or Lent(group)
        self._made = found
        return list(found.values())

    def _groups(self) -> Iterator[list[Tensor]]:
        group: list[Tensor] = []
        size = 0
        for tensor in self._tensors():
            if group and size + tensor.nbytes > self._slab_bytes:
                yield group
                group, size = [], 0
            group.append(tensor)
            size += tensor.nbytes
        if group:
            yield group


def _places(tensors: Iterable[Tensor]) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor lies in a slab, in bytes, and the slab's end."""
    places, end = [], 0
    for tensor in tensors:
        start = -(-end // ALIGNED) * ALIGNED
        end = start + tensor.nbytes
        places.append((start, end))
    return places, end


def host_bytes(count: int, device: torch.device) -> Tensor:
    """Host memory for a copy of what lies on `device`; page-locked if that is a GPU: uint8 [count].

    Not torch's `pin_memory=True`, which rounds every size up to a power of two.
    """
    if device.type != "cuda" or count == 0:
        return torch.empty(count, dtype=torch.uint8)
    whole = torch.empty(count + PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE  # no page is shared with anything else
    host = whole[start : start + count]
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(host.data_ptr(), count, 0)))
    weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
    return host
