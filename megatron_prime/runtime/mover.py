"""Brings to the device what a phase needs and sends away what it does not.

    leaving   copy to host ──▶ free ─┐
                                     ├─ budget
    arriving             allocate ◀──┘ ──▶ copy from host ──▶ remake

Copies out all start at once, on a stream of their own; an arriving piece is allocated as soon as
the budget allows, which may mean to wait for a leaving one. So copies in both directions may
overlap and the budget is never exceeded; without a budget all that leaves goes first. Masters that
only serve to make weights from are borrowed: brought, read, and freed again without a copy. On a
CPU the same happens without streams.

What another process holds (`Buffer.collective`: a server's memory) leaves first and comes last,
when everything of ours is where it should be and what is free is back at the driver: torch's cache
is of no use to that process. It moves in the same order on every rank, as do all that are remade.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prime.errors import RunError
from megatron_prime.planner.residency import MADE_FROM, Buffers
from megatron_prime.runtime.memory import Buffer, Piece

# One large storage first, while the free memory is in one piece. Weights are made while the moments
# are on their way.
_KINDS = ("gradients", "masters", "weights", "moments", "fp8_copies", "cuda_graphs", "kv_cache")


class BudgetExceeded(RunError, MemoryError):
    """The buffers of a phase don't fit; the message holds the table."""


@dataclass(slots=True)
class Moved:
    """What went over the bus."""

    to_host: int = 0
    to_device: int = 0


class Mover:
    """Knows what is on the device; `present` are names of buffers."""

    def __init__(self, budget: int | None, device: torch.device) -> None:
        """`budget`: bytes that all buffers together may have on the device; None: no limit."""
        self.budget = budget
        self.buffers: dict[str, Buffer] = {}
        self.present: set[str] = set()
        self.moved = Moved()  # since the start
        on_gpu = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if on_gpu else None
        self._in = torch.cuda.Stream(device) if on_gpu else None
        self._held = 0  # bytes on the device during a switch

    def add(self, buffer: Buffer) -> None:
        """Take over a buffer that lies on the device."""
        self.buffers[buffer.name] = buffer
        self.present.add(buffer.name)

    def on_device(self) -> int:
        """Bytes of all buffers there, measured."""
        return sum(buffer.held()[0] for buffer in self.buffers.values())

    def switch(self, wanted: Buffers) -> None:
        """Let exactly `wanted` be on the device; raises BudgetExceeded when there is no room."""
        off = [name for name in self.buffers if name in self.present and name not in wanted]
        on = [name for name in self.buffers if name in wanted and name not in self.present]
        if not off and not on:
            return
        self._held = self.on_device()
        for name in off:
            if self.buffers[name].collective:
                for piece in self.buffers[name].pieces:
                    self._free(piece)
        leaving = self._start_leaving([n for n in off if not self.buffers[n].collective])
        self.present -= set(off)
        for name in sorted(on, key=lambda name: self._turn(name, on)):
            self._arrive(name, leaving)
            self.present.add(name)
        self._drain(leaving)
        self._settle()
        for name in off:
            if (left := self.buffers[name].left) is not None:
                left()

    def written(self, names: Buffers) -> None:
        """These may have changed on the device."""
        for name in names & self.present & self.buffers.keys():
            self.buffers[name].written()

    def _turn(self, name: str, on: list[str]) -> tuple[bool, bool, int]:
        """Borrowers first, while there is most room; then by kind; other processes' last."""
        source = MADE_FROM.get(name, "")
        borrows = self.buffers[name].remake is not None and source not in {*self.present, *on}
        kind = _KINDS.index(name.partition(".")[2])
        return self.buffers[name].collective, not borrows, kind

    def _start_leaving(self, names: list[str]) -> deque[tuple[Piece, Any]]:
        """Start all copies to the host; each piece with the event that ends its copy."""
        copied: deque[tuple[Piece, Any]] = deque()
        at_once: deque[tuple[Piece, Any]] = deque()  # no copy to wait for
        with self._lane(self._out):
            for piece in (piece for name in names for piece in self.buffers[name].pieces):
                if nbytes := piece.put_away():
                    self.moved.to_host += nbytes
                    copied.append((piece, self._out and self._out.record_event()))
                else:
                    at_once.append((piece, None))
        return at_once + copied

    def _arrive(self, name: str, leaving: deque[tuple[Piece, Any]]) -> None:
        buffer, source = self.buffers[name], MADE_FROM.get(name, "")
        borrowed = buffer.remake is not None and source not in self.present
        if borrowed:
            self._bring(self.buffers[source], leaving)
        self._bring(buffer, leaving)
        if buffer.remake is not None:
            self._wait_for_copies()
            buffer.remake()
        if borrowed:
            if self._in is not None:  # the remake has read them
                torch.cuda.current_stream().synchronize()
            for piece in self.buffers[source].pieces:
                if nbytes := piece.put_away():
                    raise RuntimeError(f"{source}: {nbytes} borrowed bytes changed: our mistake")
                self._free(piece)

    def _bring(self, buffer: Buffer, leaving: deque[tuple[Piece, Any]]) -> None:
        if buffer.collective:
            self._drain(leaving)
            self._settle()
        for piece in buffer.pieces:
            while leaving and not self._has_room(piece):
                self._wait_and_free(leaving)
            if self.budget is not None and not self._has_room(piece):
                raise BudgetExceeded(
                    f"no room for {buffer.name}: {piece.nbytes} bytes should come to "
                    f"{self._held} on the device, of {self.budget}"
                )
            piece.allocate()
            self._held += piece.nbytes
            with self._lane(self._in):
                self.moved.to_device += piece.take_back()

    def _has_room(self, piece: Piece) -> bool:
        """Without a budget, never as long as something may leave."""
        return self.budget is not None and self._held + piece.nbytes <= self.budget

    def _drain(self, leaving: deque[tuple[Piece, Any]]) -> None:
        while leaving:
            self._wait_and_free(leaving)

    def _settle(self) -> None:
        """All copies are done, and what is free is the driver's: others look at that."""
        self._wait_for_copies()
        if self._in is not None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _wait_and_free(self, leaving: deque[tuple[Piece, Any]]) -> None:
        piece, copied = leaving.popleft()
        if copied is not None:
            copied.synchronize()
        self._free(piece)

    def _free(self, piece: Piece) -> None:
        before = piece.held()[0]
        piece.free()
        self._held -= before

    def _lane(self, stream: Any) -> AbstractContextManager[Any]:
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def _wait_for_copies(self) -> None:
        if self._in is not None:
            self._in.synchronize()
