"""The memory of a run: per rank what is kept, per phase how much there is at the worst moment.

Three models or four share the devices with the rollout engine. `states.py` says what each keeps,
`activations.py` what its micro-batches need, `residency.py` what lies on the device when; here they
are added up, from a run's configuration and the config.json of its models.

A pack is taken to be as full as `micro_batch_tokens` allows and to be responses only, so that all
its tokens need logits. Not counted: CUDA contexts, NCCL, CUDA graphs, fragmentation; the reserve
is for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from megatron_prime.config import (
    ConfigError,
    ModelName,
    ParallelSizes,
    PrecisionOptions,
    RunConfig,
)
from megatron_prime.planner.activations import ActivationBytes, Computation, activations
from megatron_prime.planner.counts import chunks, count
from megatron_prime.planner.engine_bytes import engine_bytes, longest_sequence
from megatron_prime.planner.residency import (
    GENERATE,
    NEEDED,
    OF_MODEL,
    PHASES,
    RESIDENT,
    SCORE,
    UPDATE_CRITIC,
    UPDATE_POLICY,
    UPDATE_PRM,
    Buffers,
    on_host,
)
from megatron_prime.planner.states import Sharding, StateBytes, frozen_bytes, trained_bytes
from megatron_prime.precision_rules import token_multiple
from megatron_prime.weights.shape import ModelShape, shape_of

GIB = 2**30
_STEP_BYTES = 8  # torch's AdamW on a CPU, per value of the tensor being stepped


class Machine(NamedTuple):
    """One device, and what of it is not to be planned with."""

    device_bytes: int = 80 * GIB
    reserve_bytes: int = 6 * GIB
    on_gpu: bool = True


class Place(NamedTuple):
    """A rank's coordinates, in Megatron's order: tensor-parallel neighbours first."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank: what it keeps, and what its work needs beside that, in bytes."""

    rank: int
    place: Place
    parameters: int  # of the policy
    kept: Mapping[str, int]
    work: Mapping[str, int]
    host: int  # page-locked, once all that ever leaves the device has left it


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """A phase on the rank that needs most."""

    phase: str
    rank: int
    resident: Mapping[str, int]
    working: tuple[str, int]  # the largest of the phase's works

    @property
    def device(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.resident.values()) + self.working[1]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A whole run."""

    machine: Machine
    world_size: int
    ranks: tuple[RankPlan, ...]
    phases: tuple[PhasePlan, ...]

    @property
    def peak(self) -> PhasePlan:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory of the rank that has most; the same in all phases."""
        return max(rank.host for rank in self.ranks)

    @property
    def fits(self) -> bool:
        """Whether it does, with the reserve."""
        return self.peak.device + self.machine.reserve_bytes <= self.machine.device_bytes


# What happens in a phase, one after the other; the largest counts.
WORK: Mapping[str, tuple[str, ...]] = {
    SCORE: ("policy.scoring", "reference.scoring"),
    UPDATE_PRM: ("prm.activations", "prm.scoring", "prm.step"),
    UPDATE_CRITIC: ("critic.activations", "critic.scoring", "critic.step"),
    UPDATE_POLICY: ("policy.activations", "policy.step"),
}


UNEVEN = (  # options that give pipeline stages different numbers of layers
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def make_plan(
    config: RunConfig,
    world_size: int,
    machine: Machine,
    table: Mapping[str, Buffers],
    one_per_stage: bool = False,
) -> MemoryPlan:
    """The plan of `python -m megatron_prime train` on `world_size` ranks.

    `one_per_stage`: only the first rank of each pipeline stage, which needs as much as the others
    or more. Raises ConfigError when models or ranks can't be cut as `[megatron]` says, or servers
    would find no room for a key/value cache.
    """
    sizes = config.parallel
    if world_size % sizes.replica:
        raise ConfigError(
            f"found {world_size} ranks, wanted a multiple of the {sizes.replica} that hold a "
            "replica: megatron.tensor_model_parallel_size * pipeline_model_parallel_size * "
            "context_parallel_size"
        )
    if uneven := [option for option in UNEVEN if config.megatron.get(option)]:
        raise ConfigError(
            f"megatron.{uneven[0]}: found {config.megatron[uneven[0]]!r}; the plan knows equal "
            "pipeline stages only; remove it, or set memory.start_anyway = true to run without a "
            "plan"
        )
    planner = _Planner(config, world_size // sizes.replica, machine, table)
    places = [
        Place(tp, cp, dp, pp)
        for pp in range(sizes.pp)
        for dp in range(world_size // sizes.replica)
        for cp in range(sizes.cp)
        for tp in range(sizes.tp)
    ]
    ranks = tuple(
        planner.rank(number, place)
        for number, place in enumerate(places)
        if not one_per_stage or place.tp == place.cp == place.dp == 0
    )
    phases = [
        max((_phase(phase, rank, table) for rank in ranks), key=lambda p: p.device)
        for phase in PHASES
        if OF_MODEL.get(phase, "policy") in config.models
    ]
    return MemoryPlan(machine, world_size, ranks, tuple(phases))


def _phase(phase: str, rank: RankPlan, table: Mapping[str, Buffers]) -> PhasePlan:
    resident = {name: n for name, n in rank.kept.items() if n and name in table[phase]}
    works = [(name, rank.work[name]) for name in WORK.get(phase, ()) if name in rank.work]
    return PhasePlan(
        phase=phase,
        rank=rank.rank,
        resident=resident,
        working=max(works, key=lambda work: work[1], default=("", 0)),
    )


_parameters = lru_cache(maxsize=4096)(count)


@lru_cache(maxsize=4096)
def _state_bytes(
    shape: ModelShape,
    sizes: ParallelSizes,
    precision: PrecisionOptions,
    sharding: Sharding | None,  # None: of a frozen model
    stage: int,
) -> StateBytes:
    parts = chunks(shape, sizes, stage)
    if sharding is None:
        return frozen_bytes(parts, shape.num_layers, precision)
    return trained_bytes(parts, shape.num_layers, precision, sharding)


class _Planner:
    """The parts of a plan; what several ranks have in common is worked out once."""

    def __init__(
        self, config: RunConfig, dp_size: int, machine: Machine, table: Mapping[str, Buffers]
    ) -> None:
        self.config, self.dp_size, self.machine, self.table = config, dp_size, machine, table
        self.shapes = {name: shape_of(config, name) for name in config.models}
        self.longest = longest_sequence(config)
        self._activation = cache(self._activations)
        in_fp32 = frozenset(n for n in self.shapes if config.precision.of(n).dtype == "fp32")
        self._on_host = on_host(table, in_fp32 | config.frozen)
        free = machine.device_bytes - machine.reserve_bytes - self._beside_servers()
        self._engine = engine_bytes(config, self.shapes["policy"], free, machine.on_gpu)

    def rank(self, number: int, place: Place) -> RankPlan:
        """What a rank keeps, and what its work needs."""
        kept, work = self._models(place.pp, place.dp * self.config.parallel.cp + place.cp)
        kept |= self._engine
        parameters = _parameters(self.shapes["policy"], self.config.parallel, place.pp)
        host = sum(n for name, n in kept.items() if name in self._on_host)
        return RankPlan(number, place, parameters, kept, work, host)

    def _beside_servers(self) -> int:
        """Bytes of the models when servers start, on the rank that has most of them.

        One number for all ranks, for all servers get the same cache: what `never` leaves there
        (moments too, which come late), else what generation needs.
        """
        row = (RESIDENT if self.table is RESIDENT else NEEDED)[GENERATE]
        stages = (self._models(stage, 0)[0] for stage in range(self.config.parallel.pp))
        return max(sum(n for name, n in kept.items() if name in row) for kept in stages)

    def _models(self, stage: int, replica: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that the models keep, and those of their work."""
        kept: dict[str, int] = {}
        work: dict[str, int] = {}
        for name in self.shapes:
            state, active = self._states(name, stage, replica), self._activation(name, stage)
            work[f"{name}.scoring"] = active.scoring
            if name in self.config.frozen:
                kinds = {k: n for k, n in state.by_kind.items() if k in ("weights", "fp8_copies")}
            else:
                kinds = state.by_kind
                work[f"{name}.activations"] = active.training
                if not self.machine.on_gpu:
                    work[f"{name}.step"] = _STEP_BYTES * state.largest_shard
            kept |= {f"{name}.{kind}": n for kind, n in kinds.items()}
        return kept, work

    def _states(self, name: ModelName, stage: int, replica: int) -> StateBytes:
        """`replica`: the number among the data- and context-parallel ranks."""
        sizes = self.config.parallel
        sharding = Sharding(
            distributed=self.machine.on_gpu,
            rank=replica,
            ranks=self.dp_size * sizes.cp,
            data_parallel=self.dp_size,
            stage=stage,
        )
        return _state_bytes(
            self.shapes[name],
            sizes,
            self.config.precision.of(name),
            None if name in self.config.frozen else sharding,
            stage,
        )

    def _activations(self, name: ModelName, stage: int) -> ActivationBytes:
        config, precision = self.config, self.config.precision.of(name)
        knobs = config.batches_of(name)
        sizes, on_gpu = config.parallel, self.machine.on_gpu
        temperature = config.rollout.temperature if name == "policy" else 1.0
        how = Computation.of(config.megatron, sizes, stage, precision, temperature, on_gpu)
        rows = max(1, knobs.mini_batch_size // self.dp_size)
        sharing = sizes.tp if how.sequence_parallel else 1
        multiple = token_multiple(precision, sharing)
        tokens = min(knobs.micro_batch_tokens, -(-rows * self.longest // sizes.cp))
        tokens = -(-tokens // multiple) * multiple
        return activations(self.shapes[name], how, tokens, tokens, rows)
