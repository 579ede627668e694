"""Buffers that can leave a device, and come back as they were.

A buffer is what one owner holds of one kind: `policy.moments`, `reference.weights`. It consists of
pieces, each a tensor's storage, and each kind of piece has its own way to be away:

- `Remade`: the bytes are given back and forgotten: gradients, which each step begins at zero, and
  16-bit weights, which are made again from the fp32 masters by `Buffer.remake`, bit for bit;
- `Kept`: the bytes wait in host memory and every view of them stays what it is: reference weights
  (whose host copy never ages, so that sending them away is free), and weights in fp32;
- `Lent`: the tensor itself lives on the host meanwhile, so that a checkpoint can read and write it
  there: masters and moments.

Host memory is page-locked on a GPU's machine, of exactly the size needed, allocated once and kept:
locking pages takes longer than copying them. A host copy is good until somebody writes to the
buffer on the device (`written`); sending a clean buffer away copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


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

    @staticmethod
    def identity(tensor: Tensor) -> int:
        """The same for tensors that share a piece."""
        return tensor.untyped_storage()._cdata

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
            self._host = host_tensor(self._bytes)
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
    """A tensor that nobody has views of and that lives on the host while it is away."""

    def __init__(self, tensor: Tensor) -> None:
        """Of a tensor that has a storage of its own."""
        self._tensor = tensor
        self._device = tensor.device
        self._host: Tensor | None = None
        self._good = self._away = False
        self.nbytes = tensor.nbytes

    @staticmethod
    def identity(tensor: Tensor) -> int:
        """The same for the same tensor."""
        return id(tensor)

    def put_away(self) -> int:
        """Start the copy, unless the host has it."""
        if self._good:
            return 0
        if self._host is None:
            self._host = host_tensor(self._tensor)
        self._host.copy_(self._tensor, non_blocking=True)
        self._good = True
        return self.nbytes

    def free(self) -> None:
        """From now on the tensor is the host copy: what is written to it counts."""
        assert self._host is not None, "put_away comes first"
        self._tensor.data = self._host
        self._away = True

    def allocate(self) -> None:
        """On the device; the content is anything until `take_back`."""
        self._tensor.data = torch.empty_like(self._tensor, device=self._device)
        self._away = False

    def take_back(self) -> int:
        """Start the copy."""
        assert self._host is not None, "put_away comes first"
        self._tensor.data.copy_(self._host, non_blocking=True)
        return self.nbytes

    def written(self) -> None:
        """The host copy is old now."""
        self._good = self._away

    def held(self) -> tuple[int, int]:
        """Bytes on device and host."""
        host = 0 if self._host is None else self._host.nbytes
        return 0 if self._away else self._tensor.untyped_storage().nbytes(), host


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


class Pieces:
    """The pieces of tensors that may be replaced or come late; each is made once."""

    def __init__(
        self, kind: type[Remade] | type[Lent], tensors: Callable[[], Iterable[Tensor]]
    ) -> None:
        """Pieces of `kind`."""
        self._kind, self._tensors = kind, tensors
        self._made: dict[int, Piece] = {}

    def __call__(self) -> list[Piece]:
        """One per storage, in the order of the tensors."""
        found: dict[int, Piece] = {}
        for tensor in self._tensors():
            key = self._kind.identity(tensor)
            found[key] = self._made.get(key) or self._kind(tensor)
        self._made = found
        return list(found.values())


def host_tensor(like: Tensor) -> Tensor:
    """Host memory for a copy of `like`; page-locked if that is on a GPU.

    Not torch's `pin_memory=True`, which rounds every size up to a power of two.
    """
    host = torch.empty_like(like, device="cpu")
    if like.is_cuda and like.nbytes:
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)))
    return host
