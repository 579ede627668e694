"""Executes a plan: each rank sends what others lack and receives what its engine process owns.

Round by round. A sender cuts the pieces out of its live parameters, on their device, takes a
checksum of each, and packs them into one message per receiver; receivers of equal pieces share the
packing. Messages go point to point (gloo, NCCL) straight into the buffer that the engine loads
from; what a rank needs and has itself is written there without a message. Beside the buffers a
round takes what this rank sends in it, which is about a bucket, and copies of the fused projections
in it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prime.protocols import WeightSource
from megatron_prime.weights.checksum import checksum
from megatron_prime.weights.fp8_blocks import BlockScales, round_to_fp8
from megatron_prime.weights.handover import HandoverLayout, Placed
from megatron_prime.weights.names import entries, hf_shapes
from megatron_prime.weights.placement import Form, Region, relative, slices
from megatron_prime.weights.plan import CHECKSUM_BYTES, Message, Piece, ReshardPlan

DTYPES = {Form.FP8: torch.float8_e4m3fn, Form.SCALES: torch.float32}


class Reshard:
    """One rank's part in every sync of a run; each method is called by all ranks alike."""

    def __init__(
        self,
        plan: ReshardPlan,
        rank: int,
        dtype: torch.dtype,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        """`dtype`: of the values that the engine wants; `tp_group`: this rank's tensor-parallel
        neighbours, who round a matrix to FP8 together."""
        self.plan, self.rank, self.dtype, self.tp_group = plan, rank, dtype, tp_group
        self.incoming = [plan.incoming(i, rank) for i in range(len(plan.rounds))]
        self._outgoing = [
            [message for message in plan.messages(i) if message.sender == rank]
            for i in range(len(plan.rounds))
        ]
        self._regions = self._own_regions()
        self._scales: BlockScales | None = None
        self._checked = False

    def layout(self, timeout_s: float) -> HandoverLayout:
        """What the engine process of this rank is told once."""
        plan = self.plan
        parameters = list(plan.engine.parameters(plan.shape, self.rank % plan.engine.tp))
        return HandoverLayout(
            parameters={parameter.name: list(parameter.size) for parameter in parameters},
            dtypes={
                parameter.name: str(self._dtype(parameter.form)).removeprefix("torch.")
                for parameter in parameters
            },
            rounds=[self._placed(messages) for messages in self.incoming],
            buffer_bytes=max(1, plan.buffer_bytes),
            timeout_s=timeout_s,
        )

    def begin(self, source: WeightSource) -> None:
        """Look at what is to be sent; RuntimeError if it is not what the plan was made for."""
        source.forget()
        if not self._checked:
            self._check(source)
        if self.plan.engine.fp8:
            shape = self.plan.shape
            rounded = {
                stretch.hf
                for parameter in self.plan.engine.parameters(shape, 0)
                for stretch in parameter.stretches
                if parameter.form is Form.FP8
            }
            regions = {hf: region for hf, region in self._regions.items() if hf in rounded}
            self._scales = BlockScales.of(source, regions, hf_shapes(shape), self.tp_group)

    def _check(self, source: WeightSource) -> None:
        for hf, region in self._regions.items():
            found, wanted = source.stretch(hf).shape, [stop - start for start, stop in region]
            if list(found) != wanted:
                raise RuntimeError(
                    f"rank {self.rank} holds {hf} as {list(found)}, the reshard plan has {wanted}: "
                    "this is a mistake of the plan, not of the run"
                )
            source.forget()
        self._checked = True

    def round(
        self, round_: int, source: WeightSource, buffer: Tensor, receivers: Collection[int]
    ) -> list[int]:
        """Move one round into `buffer` (uint8, on the device) of each of the `receivers`.

        Returns the senders' checksums of this rank's pieces, in the order of the buffer.
        """
        mine = self.incoming[round_] if self.rank in receivers else []
        packed: dict[tuple[Piece, ...], Tensor] = {}
        operations = []
        at = 0
        for message in mine:
            room = buffer[at : at + message.nbytes]
            at += message.nbytes
            if message.sender == self.rank:
                self._pack(message, source, room)
                packed[message.pieces] = room
            else:
                operations.append(dist.P2POp(dist.irecv, room, message.sender))
        for message in self._outgoing[round_]:
            if message.receiver == self.rank or message.receiver not in receivers:
                continue
            if message.pieces not in packed:
                packed[message.pieces] = buffer.new_empty(message.nbytes)
                self._pack(message, source, packed[message.pieces])
            operations.append(dist.P2POp(dist.isend, packed[message.pieces], message.receiver))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        source.forget()
        return _checksums(mine, buffer)

    def _pack(self, message: Message, source: WeightSource, room: Tensor) -> None:
        """Write the pieces and their checksums into `room`."""
        sums = []
        for piece, offset in zip(message.pieces, message.offsets, strict=False):
            values = self._values(piece, source).contiguous()
            sums.append(checksum(values))
            room[offset : offset + piece.nbytes] = values.flatten().view(torch.uint8)
        start = message.offsets[-1]
        trailer = room[start : start + len(sums) * CHECKSUM_BYTES]
        trailer.copy_(torch.stack(sums).view(torch.uint8))

    def _values(self, piece: Piece, source: WeightSource) -> Tensor:
        if piece.form is Form.SCALES:
            assert self._scales is not None, "begin() takes the scales of a plan with FP8"
            return self._scales.grid(piece.hf)[slices(piece.region)]
        held = self._regions[piece.hf]
        values = source.stretch(piece.hf)[slices(relative(piece.region, held))]
        if piece.form is Form.FP8:
            assert self._scales is not None, "begin() takes the scales of a plan with FP8"
            return round_to_fp8(values, self._scales.grid(piece.hf), piece.region)
        return values.to(self.dtype)

    def _placed(self, messages: list[Message]) -> list[Placed]:
        """Where the engine finds each piece of a round in its buffer."""
        placed, at = [], 0
        for message in messages:
            for piece, offset in zip(message.pieces, message.offsets, strict=False):
                dtype = str(self._dtype(piece.form)).removeprefix("torch.")
                region = [list(bounds) for bounds in piece.target]
                placed.append(Placed(piece.parameter, region, at + offset, dtype))
            at += message.nbytes
        return placed

    def _dtype(self, form: Form) -> torch.dtype:
        return DTYPES.get(form, self.dtype)

    def _own_regions(self) -> dict[str, Region]:
        """What this rank holds of each tensor, by its Hugging Face name."""
        training, shape = self.plan.training, self.plan.shape
        sizes = hf_shapes(shape)
        stage = self.rank // (training.world_size // training.sizes.pp)
        return {
            hf: training.region(entry, sizes[hf], shape, self.rank % training.sizes.tp)
            for entry in entries(shape)
            if stage in training.stages_of(entry, shape)
            for hf in entry.hf
        }


def _checksums(messages: list[Message], buffer: Tensor) -> list[int]:
    """The senders' checksums, from behind each message's pieces."""
    found: list[int] = []
    at = 0
    for message in messages:
        start = at + message.offsets[-1]
        trailer = buffer[start : start + len(message.pieces) * CHECKSUM_BYTES]
        found += trailer.clone().view(torch.int64).tolist()
        at += message.nbytes
    return found
