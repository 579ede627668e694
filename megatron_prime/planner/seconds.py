"""Predicted seconds of a step, phase by phase, and what each phase waits for.

Which forwards there are follows `loop.py` and the knobs that it looks at; what a forward or an
update costs, `training.py` says, what generation costs, `decoding.py`. Here they are put together:

    generate       rounds one after the other until enough prompts have passed the filter
    score          the reference's forward, and the policy's where its update can't give log-probs
    update_prm     mini-batches; a forward more for `prm.forward`, `prm.measure_after`, `prm.loss`
    update_critic  a forward, mini-batches
    update_policy  mini-batches
    sync_weights   bytes that a rank gets, by the way they take, and four passes over them in device
                   memory (cut out, copied in, two checksums). `plan.py reshard` counts messages
    moves          before each phase, of what the residency table lets go of (`moves.py`)

Nothing here is measured, and what is not in it takes time as well: verification as far as it
outlasts generation, the loop's own work, Python, uneven packs, slow ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_prime.config import ModelName, RunConfig
from megatron_prime.planner.engine_bytes import engine_tp, weight_bytes
from megatron_prime.planner.flops import load_of
from megatron_prime.planner.generation import Rollouts
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import MemoryPlan
from megatron_prime.planner.moves import Moves
from megatron_prime.planner.rates import Rates
from megatron_prime.planner.residency import (
    EVALUATE,
    GENERATE,
    OF_MODEL,
    SCORE,
    SYNC_WEIGHTS,
    UPDATE_CRITIC,
    UPDATE_POLICY,
    UPDATE_PRM,
    Table,
)
from megatron_prime.planner.table import scored_share
from megatron_prime.planner.training import Seconds, Trainer, add, times
from megatron_prime.weights.shape import ModelShape, shape_of

_SYNC_PASSES = 4  # over a rank's new weights in device memory
_STEP = (GENERATE, SCORE, UPDATE_PRM, UPDATE_CRITIC, UPDATE_POLICY, SYNC_WEIGHTS)


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """One phase, once."""

    phase: str
    work: Seconds  # by what they are spent on
    moves: Seconds  # before it

    @property
    def moving(self) -> float:
        """Seconds of moves."""
        return sum(self.moves.values())

    @property
    def seconds(self) -> float:
        """Moves and work."""
        return sum(self.work.values()) + self.moving

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        found = add(self.work, self.moves)
        return max(found, key=lambda name: found[name]) if self.seconds else "-"


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """One step; `extra` are phases that only some steps have, as far as they can be told."""

    phases: tuple[PhaseSeconds, ...]
    extra: tuple[PhaseSeconds, ...]
    tokens: float  # of prompts and responses that it trains on
    world_size: int

    @property
    def seconds(self) -> float:
        """Of a step without evaluation and checkpoint."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens that were trained on."""
        return self.tokens / self.seconds / self.world_size

    def of(self, phase: str) -> PhaseSeconds | None:
        """None where there is no prediction."""
        return next((one for one in (*self.phases, *self.extra) if one.phase == phase), None)


def predict(
    config: RunConfig,
    plan: MemoryPlan,
    table: Table,
    rates: Rates,
    expected: Expectations,
) -> StepSeconds:
    """The seconds of a run on GPUs whose memory plan is `plan`, made with `table`."""
    return _Predictor(config, plan, table, rates, expected).step()


def prm_forwards(config: RunConfig) -> int:
    """Forwards of the PRM without gradients: those of loop.py's `learn_process_rewards`, and the
    one in which responses are compared (models/prm.py)."""
    forward, compares = config.prm.forward, config.prm.loss not in ("ce", "ce_hard")
    after = forward == "double" or config.prm.measure_after
    return (forward == "single_strict") + after + compares


def rollouts_of(
    config: RunConfig, plan: MemoryPlan, rates: Rates, expected: Expectations
) -> Rollouts:
    """The engine of a run whose memory plan is `plan`."""
    cache = min(rank.kept.get("engine.kv_cache", 0) for rank in plan.ranks)
    shape = ModelShape.from_hf(config.model.hf, config.parallel.tp)
    return Rollouts(config, shape, plan.world_size, cache, rates, expected)


def trainer_of(name: ModelName, config: RunConfig, world_size: int, rates: Rates) -> Trainer:
    """A model of a run on so many ranks."""
    sizes = config.parallel
    return Trainer(
        shape_of(config, name),
        sizes,
        world_size // sizes.replica,
        config.precision.of(name),
        config.megatron,
        config.batches_of(name),
        rates,
    )


class _Predictor:
    """The parts of a prediction."""

    def __init__(
        self,
        config: RunConfig,
        plan: MemoryPlan,
        table: Table,
        rates: Rates,
        expected: Expectations,
    ) -> None:
        self.config, self.rates = config, rates
        self.world_size, self.sizes = plan.world_size, config.parallel
        self.policy = trainer_of("policy", config, plan.world_size, rates)
        self.moves = Moves(config, plan, table, self.policy)
        self.rows = config.rollout.prompts_per_step * config.rollout.group_size
        self.generates = config.debug.rollouts_from is None
        self.rollouts = rollouts_of(config, plan, rates, expected)
        self.load = load_of(expected.mean_prompt, self.rollouts.trained())

    def step(self) -> StepSeconds:
        """All phases."""
        work = {
            GENERATE: self.rollouts.of_step() if self.generates else {},
            SCORE: self._score(),
            UPDATE_PRM: self._update_prm(),
            UPDATE_CRITIC: self._update_critic(),
            UPDATE_POLICY: self.policy.update(self.load, self.rows),
            SYNC_WEIGHTS: self._sync(),
        }
        names = [phase for phase in _STEP if OF_MODEL.get(phase, "policy") in self.config.models]
        found = tuple(
            PhaseSeconds(phase, work[phase], self.moves.into(names, number))
            for number, phase in enumerate(names)
        )
        return StepSeconds(found, tuple(self._extra()), self.load.tokens, self.world_size)

    def _trainer(self, name: ModelName) -> Trainer:
        return trainer_of(name, self.config, self.world_size, self.rates)

    def _score(self) -> Seconds:
        share = scored_share(self.config)
        rows = round(share * self.rows)
        own = self.policy.forward(self.load * share, rows) if rows else {}
        if "reference" not in self.config.models:
            return own
        return add(own, self._trainer("reference").forward(self.load, self.rows))

    def _update_prm(self) -> Seconds:
        if not self.config.uses_prm:
            return {}
        prm, knobs = self._trainer("prm"), self.config.prm
        if "prm" in self.config.frozen:
            return prm.forward(self.load, self.rows)
        found = prm.update(self.load, self.rows)
        found = add(found, times(prm.forward(self.load, self.rows), prm_forwards(self.config)))
        if prm.precision.fp8 is None:
            return found
        share = min(1.0, knobs.mini_batch_size / self.rows)  # once more, without FP8
        plain = replace(prm, precision=prm.precision.model_copy(update={"fp8": None}))
        return add(found, plain.forward(self.load * share, knobs.mini_batch_size))

    def _update_critic(self) -> Seconds:
        """A forward for the values, then the mini-batches."""
        if "critic" not in self.config.models:
            return {}
        critic = self._trainer("critic")
        return add(critic.forward(self.load, self.rows), critic.update(self.load, self.rows))

    def _sync(self) -> Seconds:
        """The busiest rank: what it gets from its node's other ranks and from other nodes."""
        if not self.generates:
            return {}
        sizes, tp, node = self.sizes, engine_tp(self.config), self.rates.ranks_per_node
        handed = weight_bytes(self.config, self.policy.shape)
        ranks_of_stage = self.world_size // sizes.pp
        stages_in_node = min(sizes.pp, max(1, node // ranks_of_stage))
        far = 1 - stages_in_node / sizes.pp
        own = min(1.0, tp / sizes.tp) / sizes.pp
        ways = {
            "network": far * handed / self.rates.network,
            "nvlink": max(0.0, 1 - far - own) * handed / self.rates.nvlink,
        }
        slower = max(ways, key=lambda way: ways[way])  # both work at once
        return {slower: ways[slower], "hbm": _SYNC_PASSES * handed / self.rates.hbm}

    def _extra(self) -> Iterator[PhaseSeconds]:
        knobs = self.config.evaluate
        if self.config.data.eval is not None and knobs.max_prompts and self.generates:
            one = self.rollouts.round(knobs.max_prompts, 1)
            yield PhaseSeconds(EVALUATE, one.by, self.moves.into((SYNC_WEIGHTS, EVALUATE), 1))
