"""What limits a step and what would help: the planner's numbers, turned round.

`spent` adds up a step's predicted seconds by what they wait for. `HELP` are changes to a run or to
its machines, each as options of `tools/plan.py step`; every one is planned and predicted anew, so
that a change which helps one phase and harms another, or does not fit, shows both. `updates` sets
the closed form of the pipeline's bubble beside the schedule, run through with packs as
`data/packing.py` makes them, and `exchanged` the planner's bytes beside all that an update
exchanges. All of it is prediction: no GPU has confirmed any number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_prime.config import RunConfig
from megatron_prime.planner import pipeline
from megatron_prime.planner.door import machine_of
from megatron_prime.planner.exchanges import Exchanges, Pack, on_the_wire
from megatron_prime.planner.flops import Load, load_of
from megatron_prime.planner.lengths import Expectations, response_lengths
from megatron_prime.planner.memory import GIB, MemoryPlan
from megatron_prime.planner.rates import Rates
from megatron_prime.planner.seconds import StepSeconds, predict, trainer_of
from megatron_prime.planner.table import plan_of
from megatron_prime.planner.training import Seconds, Trainer, add


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that may help."""

    what: str
    knobs: tuple[str, ...] = ()  # --section.key=value
    rates: tuple[str, ...] = ()  # --rate NAME=VALUE
    sampled_per_kept: float | None = None

    @property
    def options(self) -> str:
        """For the command line of `tools/plan.py step`."""
        found = [*self.knobs, *(f"--rate {rate}" for rate in self.rates)]
        if self.sampled_per_kept:
            found.append(f"--sampled-per-kept {self.sampled_per_kept:g}")
        return " ".join(found)


_FP8 = tuple(f"--precision.{model}.fp8=hybrid" for model in ("policy", "prm", "reference"))
HELP = (
    Change("all prompts in one round", ("--rollout.prompts_per_round=512",)),
    Change(
        "a quarter more prompts, the last ones aborted",
        ("--rollout.prompts_per_round=640", "--rollout.abort_surplus=true"),
        sampled_per_kept=2,
    ),
    Change("every prompt passes the filter", sampled_per_kept=1),
    Change(
        "servers of TP 4",
        ("--rollout.tensor_parallel_size=4", "--sglang.mem_fraction_static=0.6"),
    ),
    Change("FP8 weights in the servers", ("--rollout.fp8_weights=true",)),
    Change("FP8 in all three models", _FP8),
    Change("exchanges of TP behind the products", ("--megatron.tp_comm_overlap=true",)),
    Change("two virtual stages", ("--megatron.virtual_pipeline_model_parallel_size=2",)),
    Change("networks twice as fast", rates=("network_gb_per_s=100",)),
    Change("NVLink twice as fast", rates=("nvlink_gb_per_s=900",)),
    Change("HBM as an H200's", rates=("hbm_gb_per_s=4800",)),
    Change("small all-reduces twice as fast", rates=("collective_us=5",)),
    Change("65 % of the peak achieved, not 55 %", rates=("compute_share=0.65",)),
)


def prediction(
    config: RunConfig, ranks: int, rates: Rates, expected: Expectations
) -> tuple[MemoryPlan, StepSeconds]:
    """Memory and seconds on `ranks` GPUs. Raises ConfigError where there is no plan."""
    machine = machine_of(config, round(rates.memory_gib * GIB), True)
    assert machine is not None, "a device's memory was given"
    table, plan = plan_of(config, ranks, machine)
    return plan, predict(config, plan, table, rates, expected)


def spent(step: StepSeconds) -> Seconds:
    """A step's seconds by what they wait for, the largest first."""
    found = add(*(part for phase in step.phases for part in (phase.work, phase.moves)))
    return dict(sorted(found.items(), key=lambda one: -one[1]))


@dataclass(frozen=True, slots=True)
class Pipelined:
    """Forwards and backwards of one update, all its mini-batches, worked out in one way."""

    seconds: float
    work: float  # seconds of the busiest stage
    micro_batches: int  # of a replica
    tokens: float  # that a replica's stages compute, fill included

    @property
    def bubble(self) -> float:
        """Waiting, as a part of the work."""
        return self.seconds / self.work - 1

    def __add__(self, other: Pipelined) -> Pipelined:
        return Pipelined(
            self.seconds + other.seconds,
            self.work + other.work,
            self.micro_batches + other.micro_batches,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True, slots=True)
class Update:
    """The same update by the planner's closed form, and by schedules that were run through."""

    virtual: int  # stages on each rank
    formula: Pipelined
    equal: Pipelined  # with as many equal micro-batches
    packs: Pipelined  # with those that data/packing.py makes, on the slowest replica


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a rank hands to one kind of exchange in an update of the policy."""

    what: str  # "group operation"
    ranks: int  # of the group
    first: int  # bytes, on a rank of the first pipeline stage
    last: int  # of the last


def exchanged(
    config: RunConfig, ranks: int, rates: Rates, expected: Expectations
) -> tuple[list[Exchanged], dict[str, tuple[float, float]]]:
    """All exchanges of an update; and by group what the first stage's rank sends in rings, and what
    the planner counts of it."""
    trainer, lengths = trainer_of("policy", config, ranks, rates), _lengths(config, expected)
    sizes, size = trainer.sizes, trainer.knobs.mini_batch_size
    found = [Counter[str](), Counter[str]()]
    planned: Counter[str] = Counter()
    for first in range(0, len(lengths), size):
        mine = lengths[first : first + size]
        replica = pipeline.packed(expected.mean_prompt, mine, trainer)[0]
        packs = [Pack(int(load.tokens), int(load.wanted), 0) for load in replica.loads]
        for counts, stage in zip(found, (0, sizes.pp - 1), strict=True):
            counts.update(Exchanges(trainer, stage).update(packs, distributed=True))
        share = load_of(expected.mean_prompt, mine) * (1 / trainer.data_parallel)
        tp = sum(trainer.tensor_bytes(share, backward) for backward in (False, True))
        handed = trainer.handed_bytes(share) * (2 * sizes.vpp - 1) if sizes.pp > 1 else 0.0
        planned.update({"tp": tp, "ranks": handed, "dp": sum(trainer.shard_bytes())})
    groups = {"tp": sizes.tp, "dp": sizes.cp * trainer.data_parallel, "cp": sizes.cp}
    groups |= {"embedding": 2, "ranks": sizes.pp, "world": ranks, "replica": sizes.replica}
    rows = [
        Exchanged(what, groups[what.split()[0]], found[0][what], found[1][what])
        for what in sorted({*found[0], *found[1]})
    ]
    wire = on_the_wire(found[0], groups)
    return rows, {group: (sent, float(planned[group])) for group, sent in wire.items()}


def updates(
    config: RunConfig, ranks: int, rates: Rates, expected: Expectations, virtual: Sequence[int]
) -> Iterator[Update]:
    """For each number of virtual stages that divides a stage's layers."""
    trainer, lengths = trainer_of("policy", config, ranks, rates), _lengths(config, expected)
    for number in virtual:
        if trainer.shape.num_layers % (trainer.sizes.pp * number) == 0:
            sizes = replace(trainer.sizes, vpp=number)
            yield _update(replace(trainer, sizes=sizes), expected.mean_prompt, lengths)


def _lengths(config: RunConfig, expected: Expectations) -> tuple[int, ...]:
    """Of the responses that a step trains on."""
    knobs = config.rollout
    rows, most = knobs.prompts_per_step * knobs.group_size, knobs.max_response_length
    return response_lengths(rows, expected.mean_response, expected.spread, most)


def _update(trainer: Trainer, prompt: float, lengths: Sequence[int]) -> Update:
    size = trainer.knobs.mini_batch_size
    nothing = Pipelined(0.0, 0.0, 0, 0.0)
    formula = equal = packs = nothing
    for first in range(0, len(lengths), size):
        mine = tuple(lengths[first : first + size])
        whole = load_of(prompt, mine)
        count = trainer.micro_batches(whole, len(mine))
        share = whole * (1 / trainer.data_parallel)
        formula += _closed_form(trainer, share, count)
        equal += _run(trainer, pipeline.Packed.equal(share, count))
        replicas = pipeline.packed(prompt, mine, trainer)
        packs += max((_run(trainer, one) for one in replicas), key=lambda found: found.seconds)
    return Update(trainer.sizes.vpp, formula, equal, packs)


def _closed_form(trainer: Trainer, share: Load, count: int) -> Pipelined:
    sizes = trainer.sizes
    work = sum(trainer.pass_seconds(share, backward) for backward in (False, True))
    handed = 2 * sizes.vpp * trainer.handed_on(share) * (sizes.pp > 1)
    waiting = (sizes.pp - 1) / (count * sizes.vpp)
    return Pipelined(work * (1 + waiting) + handed, work, count, share.tokens)


def _run(trainer: Trainer, replica: pipeline.Packed) -> Pipelined:
    found = pipeline.update(trainer, replica)
    tokens = sum(load.tokens for load in replica.loads)
    return Pipelined(found.seconds, max(found.busy), len(replica.loads), tokens)
