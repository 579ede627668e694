"""A pipeline's schedule, event by event, for micro-batches that are not equally long.

Megatron's order (pipeline_parallel/schedules.py, 0.16.1). With p stages and v virtual stages each,
micro-batches go in groups of p through the chunks of a stage, in the backward pass from the last
chunk to the first. Stage r begins with this many forwards, then does one forward and one backward
in turn, and ends with the backwards that are left:

    1F1B (v = 1)    p - r - 1
    interleaved     2 (p - r - 1) + (v - 1) p

Here every stage runs its list, and each entry starts when its input has come: hidden states of the
stage before, or gradients of the stage behind. The share of a pipeline's time in which its busiest
stage waits is the bubble; for equal micro-batches and stages that is the planner's closed form, a
part (p - 1) / (m v) on top of a stage's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_prime.data.packing import plan_micro_batches
from megatron_prime.planner.flops import Load, load_of
from megatron_prime.planner.training import Trainer


@dataclass(frozen=True, slots=True)
class Work:
    """An entry of a stage's list."""

    backward: bool
    micro_batch: int
    chunk: int  # of the stage; 0 without virtual stages


@dataclass(frozen=True, slots=True)
class Run:
    """A schedule that was run through."""

    seconds: float
    busy: tuple[float, ...]  # seconds of work, by stage

    @property
    def bubble(self) -> float:
        """Waiting of the busiest stage, as a part of its work."""
        return self.seconds / max(self.busy) - 1


def order(stage: int, stages: int, micro_batches: int, virtual: int = 1) -> list[Work]:
    """What a stage does, one after the other."""
    places = [
        (micro_batch, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in range(virtual)
        for micro_batch in range(first, min(first + stages, micro_batches))
    ]
    forwards = [Work(False, *place) for place in places]
    backwards = [Work(True, number, virtual - 1 - chunk) for number, chunk in places]
    behind = stages - stage - 1
    warm_up = behind if virtual == 1 else 2 * behind + (virtual - 1) * stages
    warm_up = min(warm_up, len(forwards))
    found = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        found += [forward, backward]
    return found + backwards[len(forwards) - warm_up :]


def run(
    stages: int,
    micro_batches: int,
    virtual: int,
    seconds: Callable[[int, Work], float],
    handing_on: float = 0.0,
) -> Run:
    """`seconds(stage, work)` of each entry; `handing_on`: from a stage's end to the next's start.

    AssertionError if stages wait for each other for ever, which no order of ours lets them do.
    """
    lists = [order(stage, stages, micro_batches, virtual) for stage in range(stages)]
    clocks, busy, at = [0.0] * stages, [0.0] * stages, [0] * stages
    done: dict[tuple[bool, int, int], float] = {}  # when; (backward, micro-batch, virtual stage)
    last = stages * virtual - 1
    left = sum(map(len, lists))
    while left:
        before = left
        for stage, works in enumerate(lists):
            while at[stage] < len(works):
                work = works[at[stage]]
                place = work.chunk * stages + stage
                input_ = _input(work, place, last)
                if input_ is not None and input_ not in done:
                    break
                ready = done[input_] if input_ else 0.0
                moved = handing_on if input_ and input_[2] != place else 0.0
                lasts = seconds(stage, work)
                clocks[stage] = max(clocks[stage], ready + moved) + lasts
                done[work.backward, work.micro_batch, place] = clocks[stage]
                busy[stage] += lasts
                at[stage] += 1
                left -= 1
        assert left < before, "stages wait for each other"
    return Run(max(clocks), tuple(busy))


def _input(work: Work, place: int, last: int) -> tuple[bool, int, int] | None:
    """The entry whose output `work` needs; None for a forward of the first stage."""
    if not work.backward:
        return (False, work.micro_batch, place - 1) if place else None
    if place == last:
        return (False, work.micro_batch, place)
    return (True, work.micro_batch, place + 1)


@dataclass(frozen=True, slots=True)
class Packed:
    """The micro-batches of one data-parallel replica in one mini-batch."""

    loads: tuple[Load, ...]

    @classmethod
    def equal(cls, whole: Load, number: int) -> Packed:
        """`whole` in equal parts."""
        return cls((whole * (1 / number),) * number)


def packed(prompt: float, responses: Sequence[int], trainer: Trainer) -> list[Packed]:
    """One mini-batch's rows as data/packing.py deals them to all replicas.

    Packs of a pipeline are filled up to the longest of their replica (models/micro_batch.py).
    """
    sizes = trainer.sizes
    lengths = [round(prompt) + response for response in responses]
    capacity = trainer.knobs.micro_batch_tokens * sizes.cp
    multiple = sizes.pp if sizes.vpp > 1 else 1
    plan = plan_micro_batches(lengths, trainer.data_parallel, capacity, sizes.pp, multiple)
    found = []
    for packs in plan:
        longest = max(sum(lengths[row] for row in pack) for pack in packs)
        found.append(Packed(tuple(_filled(prompt, responses, pack, longest) for pack in packs)))
    return found


def _filled(prompt: float, responses: Sequence[int], pack: Sequence[int], length: int) -> Load:
    """A pack's load; the fill is one more sequence that nobody wants logits of."""
    load = load_of(round(prompt), tuple(responses[row] for row in pack))
    fill = length - load.tokens
    return Load(length, load.seen_keys + fill * (fill + 1) / 2, load.wanted)


def update(trainer: Trainer, replica: Packed) -> Run:
    """Forwards and backwards of one mini-batch on one replica; logits cost the last stage alone."""
    sizes = trainer.sizes

    def seconds(stage: int, work: Work) -> float:
        load = replica.loads[work.micro_batch]
        if (stage, work.chunk) != (sizes.pp - 1, sizes.vpp - 1):
            return trainer.pass_seconds(replace(load, wanted=0.0), work.backward) / sizes.vpp
        # The logits belong to one of the stage's chunks.
        body = trainer.pass_seconds(replace(load, wanted=0.0), work.backward)
        return trainer.pass_seconds(load, work.backward) - body + body / sizes.vpp

    largest = max(load.tokens for load in replica.loads)
    handing_on = trainer.handed_on(Load(largest, 0.0, 0.0))
    return run(sizes.pp, len(replica.loads), sizes.vpp, seconds, handing_on)
