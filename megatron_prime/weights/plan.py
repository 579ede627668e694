"""Who sends what to whom: from the trainer's shards straight to each SGLang rank's own parameters.

An engine rank receives only the bytes that it holds, whole tensors are never made. A `Piece` is
what a trainer's shard and an engine's parameter have in common. What a rank needs and holds itself
is copied, not sent; else the least busy of the ranks that hold it sends it (data-parallel and
context-parallel replicas, both ends of a tied embedding), those of the same node first. Pieces
travel in rounds of at most one bucket per receiver, so that a round can be loaded while the next
one is on its way; each round has pieces of all pipeline stages, so that all ranks send in it.

The plan is a pure function of the model's shape and two layouts, the same on every rank; made once
per run, without a process group or a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_prime.weights.layout import Layout
from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.placement import (
    BLOCK,
    EngineLayout,
    EngineParameter,
    Form,
    Region,
    TrainingLayout,
    intersection,
    numel,
    relative,
)
from megatron_prime.weights.shape import ModelShape

ALIGNMENT = 16  # bytes; where a piece starts in a message
CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Source:
    """The trainer's ranks that hold the same values."""

    stages: tuple[int, ...]
    tp_rank: int | None  # None: all tensor-parallel ranks do


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a Hugging Face tensor on its way into a parameter of an engine rank."""

    hf: str
    form: Form
    region: Region  # of the Hugging Face tensor; of its grid of blocks for scales
    source: Source
    parameter: str  # SGLang's
    target: Region  # of that parameter
    nbytes: int


@dataclass(frozen=True, slots=True)
class Message:
    """The pieces of one round that go from one rank to another, and where they lie in bytes.

    Behind the pieces lie their checksums, int64 each.
    """

    sender: int
    receiver: int
    pieces: tuple[Piece, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece starts, and, last, where the checksums do."""
        found = [0]
        for piece in self.pieces:
            found.append(found[-1] + -(-piece.nbytes // ALIGNMENT) * ALIGNMENT)
        return tuple(found)

    @property
    def nbytes(self) -> int:
        """Length of the message."""
        checksums = len(self.pieces) * CHECKSUM_BYTES
        return self.offsets[-1] + -(-checksums // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """All messages of one weight sync."""

    shape: ModelShape
    training: TrainingLayout
    engine: EngineLayout
    rounds: tuple[tuple[tuple[Piece, ...], ...], ...]  # [round][engine rank] → pieces
    senders: Mapping[tuple[Source, int], int]  # by source and receiver

    def incoming(self, round_: int, receiver: int) -> list[Message]:
        """The messages of a round to a rank, its own share among them, in the buffer's order."""
        by_sender: dict[int, list[Piece]] = defaultdict(list)
        for piece in self.rounds[round_][receiver % self.engine.tp]:
            by_sender[self.senders[piece.source, receiver]].append(piece)
        return [
            Message(sender, receiver, tuple(pieces)) for sender, pieces in sorted(by_sender.items())
        ]

    def messages(self, round_: int) -> Iterator[Message]:
        """All messages of a round."""
        for receiver in range(self.engine.world_size):
            yield from self.incoming(round_, receiver)

    @property
    def buffer_bytes(self) -> int:
        """The longest round of any receiver."""
        return max(
            sum(message.nbytes for message in self.incoming(round_, receiver))
            for round_ in range(len(self.rounds))
            for receiver in range(self.engine.world_size)
        )


def make_plan(
    shape: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    value_bytes: int,
    bucket_bytes: int,
    ranks_per_node: int,
) -> ReshardPlan:
    """The plan for values of `value_bytes` each, in rounds of about `bucket_bytes` per receiver.

    Raises ConfigError when the engine can't cut the model so.
    """
    engine.check(shape)
    per_rank = [
        list(_pieces(shape, training, parameters, value_bytes, bucket_bytes))
        for rank in range(engine.tp)
        if (parameters := tuple(engine.parameters(shape, rank)))
    ]
    cut = [_cut(_stages_in_turn(pieces), bucket_bytes) for pieces in per_rank]
    rounds = tuple(
        tuple(ranks[i] if i < len(ranks) else () for ranks in cut)
        for i in range(max(len(ranks) for ranks in cut))
    )
    senders = _choose_senders(per_rank, training, engine, ranks_per_node)
    return ReshardPlan(shape, training, engine, rounds, senders)


def _pieces(
    shape: ModelShape,
    training: TrainingLayout,
    parameters: Sequence[EngineParameter],
    value_bytes: int,
    bucket_bytes: int,
) -> Iterator[Piece]:
    """What an engine rank needs, shard by shard, in pieces of at most a bucket over the stages."""
    sizes = hf_shapes(shape)
    item_bytes = {Form.VALUES: value_bytes, Form.FP8: 1, Form.SCALES: 4}
    for parameter in parameters:
        stages = training.stages_of(parameter.entry, shape)
        shared = parameter.entry.layout is Layout.WHOLE
        tp_ranks: Sequence[int | None] = (None,) if shared else range(training.sizes.tp)
        for stretch in parameter.stretches:
            for tp_rank in tp_ranks:
                held = training.region(parameter.entry, sizes[stretch.hf], shape, tp_rank)
                if parameter.form is Form.SCALES:
                    held = _own_blocks(held)
                if (region := intersection(held, stretch.region)) is None:
                    continue
                piece = Piece(
                    hf=stretch.hf,
                    form=parameter.form,
                    region=region,
                    source=Source(stages, tp_rank),
                    parameter=parameter.name,
                    target=relative(region, stretch.region, stretch.row),
                    nbytes=numel(region) * item_bytes[parameter.form],
                )
                yield from _split(piece, max(1, bucket_bytes // training.sizes.pp))


def _own_blocks(held: Region) -> Region:
    """Of the blocks that a shard touches, those that begin in it: each block has one owner."""
    return tuple((-(-start // BLOCK), -(-stop // BLOCK)) for start, stop in held)


def _split(piece: Piece, max_bytes: int) -> Iterator[Piece]:
    """Cut by rows into pieces of at most `max_bytes` (or one row)."""
    (start, stop), *columns = piece.region
    first = piece.target[0][0]
    rows = max(1, min(stop - start, max_bytes * (stop - start) // piece.nbytes))
    for at in range(start, stop, rows):
        until = min(at + rows, stop)
        yield replace(
            piece,
            region=((at, until), *columns),
            target=((first + at - start, first + until - start), *piece.target[1:]),
            nbytes=piece.nbytes // (stop - start) * (until - at),
        )


def _stages_in_turn(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of each pipeline stage spread evenly over the whole sync, in their order."""
    by_stage: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_stage[piece.source.stages].append(piece)
    placed: list[tuple[float, Piece]] = []
    for of_stage in by_stage.values():
        total, before = sum(piece.nbytes for piece in of_stage), 0
        for piece in of_stage:
            placed.append((before / total, piece))
            before += piece.nbytes
    return [piece for _, piece in sorted(placed, key=lambda at: at[0])]


def _cut(pieces: Sequence[Piece], bucket_bytes: int) -> list[tuple[Piece, ...]]:
    """Consecutive pieces of about a bucket."""
    rounds: list[list[Piece]] = []
    held = bucket_bytes
    for piece in pieces:
        if held + piece.nbytes > bucket_bytes:
            rounds.append([])
            held = 0
        rounds[-1].append(piece)
        held += piece.nbytes
    return [tuple(round_) for round_ in rounds]


def _choose_senders(
    per_rank: Sequence[Sequence[Piece]],
    training: TrainingLayout,
    engine: EngineLayout,
    ranks_per_node: int,
) -> dict[tuple[Source, int], int]:
    """A sender for each source and receiver: itself, else the least busy, of its node if any."""
    needed: list[dict[Source, int]] = [defaultdict(int) for _ in per_rank]
    for pieces, by_source in zip(per_rank, needed, strict=True):
        for piece in pieces:
            by_source[piece.source] += piece.nbytes
    senders: dict[tuple[Source, int], int] = {}
    sent = [0] * training.world_size
    for receiver in range(training.world_size):
        node = receiver // ranks_per_node
        for source, nbytes in needed[receiver % engine.tp].items():
            holders = {
                rank for stage in source.stages for rank in training.holders(stage, source.tp_rank)
            }
            if receiver in holders:
                senders[source, receiver] = receiver
                continue
            near = [rank for rank in holders if rank // ranks_per_node == node]
            sender = min(near or holders, key=lambda rank: (sent[rank], rank))
            senders[source, receiver] = sender
            sent[sender] += nbytes
    return senders
