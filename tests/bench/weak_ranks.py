"""The ranks of weak_scaling.py: a real PRIME step in each layout, its bytes counted and predicted.

`python -m torch.distributed.run --nproc-per-node=N weak_ranks.py FOLDER ragged|equal LAYOUT …`
writes FOLDER/rank<R>.json: {layout: {phase: {"counted": …, "formula": …, "planner": …}}}, bytes by
"group operation"; the planner's are what a rank sends in an update, by group, if rollouts are
`equal`ly long and packs full. A layout is written tp2.pp2.sp: tp, pp, cp and vpp with their sizes,
`sp` for sequence parallelism, `zero` for the distributed optimizer, `critic` for one that learns,
too; the ranks that a replica leaves are data-parallel.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import counted

counted.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_prime.runtime.compat import before_megatron_import  # noqa: E402

before_megatron_import()

from megatron.core import parallel_state  # noqa: E402

from megatron_prime.config import (  # noqa: E402
    CriticSection,
    ParallelSizes,
    PolicySection,
    PrecisionOptions,
    PrmSection,
    RunConfig,
)
from megatron_prime.models import training  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.critic import MegatronCritic  # noqa: E402
from megatron_prime.models.engine import Engine  # noqa: E402
from megatron_prime.models.guard import Guard  # noqa: E402
from megatron_prime.models.micro_batch import cut  # noqa: E402
from megatron_prime.models.policy import MegatronPolicy  # noqa: E402
from megatron_prime.models.prm import MegatronPrm  # noqa: E402
from megatron_prime.models.reference import MegatronReference  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.planner.exchanges import Exchanges, Pack  # noqa: E402
from megatron_prime.planner.flops import Load  # noqa: E402
from megatron_prime.planner.rates import GPUS  # noqa: E402
from megatron_prime.planner.training import Trainer  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import RolloutBatch, ScoredBatch, TokenSequence, TrainBatch  # noqa: E402
from megatron_prime.value_batch import ValueBatch  # noqa: E402
from megatron_prime.weights.placement import EngineLayout, TrainingLayout  # noqa: E402
from megatron_prime.weights.plan import make_plan  # noqa: E402
from megatron_prime.weights.reshard import Reshard  # noqa: E402

TIMEOUT_S = 300
ROWS_PER_RANK, GROUP, MINI_BATCHES, PACK = 8, 4, 2, 160
EXACT = PrecisionOptions(dtype="fp32")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the ranks are split over."""

    sizes: ParallelSizes
    sequence_parallel: bool
    distributed_optimizer: bool
    critic: bool

    @classmethod
    def of(cls, name: str) -> Layout:
        sizes = {key: int(number) for key, number in re.findall(r"(tp|vpp|pp|cp)(\d+)", name)}
        words = name.split(".")
        return cls(ParallelSizes(**sizes), *(word in words for word in ("sp", "zero", "critic")))

    @property
    def megatron(self) -> dict[str, Any]:
        sizes = self.sizes
        options: dict[str, Any] = {
            "tensor_model_parallel_size": sizes.tp,
            "pipeline_model_parallel_size": sizes.pp,
            "context_parallel_size": sizes.cp,
            "sequence_parallel": self.sequence_parallel,
        }
        if sizes.vpp > 1:
            options["virtual_pipeline_model_parallel_size"] = sizes.vpp
        return options


def main(folder: Path, lengths: str, layouts: list[str]) -> None:
    distributed.initialize(rendezvous_from(os.environ), ParallelSizes(), 1, TIMEOUT_S)
    found = {}
    for name in layouts:
        layout = Layout.of(name)
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(layout.sizes, 1, TIMEOUT_S)
        counted.name_groups()
        found[name] = prime_step(folder, layout, lengths == "equal")
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    distributed.destroy()


def prime_step(folder: Path, layout: Layout, equal: bool) -> dict[str, Any]:
    """Score, learn process rewards, update the policy, reshard."""
    hf = folder / "model"
    shape = ModelShape.from_hf(hf, layout.sizes.tp)
    rows = ROWS_PER_RANK * dist.get_world_size()
    common = {"lr": 1e-3, "mini_batch_size": rows // MINI_BATCHES, "micro_batch_tokens": PACK}
    policy_knobs, prm_knobs = PolicySection(**common), PrmSection(**common)
    paths = {"run": {"folder": folder}, "model": {"hf": hf}, "data": {"train": folder}}
    config = RunConfig.model_validate(paths)
    policy = MegatronPolicy(
        engine_of(shape, layout, policy_knobs), policy_knobs, 1, Guard(config, "policy")
    )
    prm = MegatronPrm(engine_of(shape, layout, prm_knobs), prm_knobs, Guard(config, "prm"))
    frozen = Engine(build_model(shape, EXACT, layout.megatron), shape, PACK, 1.0)
    reference = MegatronReference(frozen, Guard(config, "reference"))
    batch = rollouts(rows, shape.vocab_size, equal)
    replicas = dist.get_world_size() // layout.sizes.replica
    rates = GPUS["h100"]  # of no consequence for bytes
    trainer = Trainer(shape, layout.sizes, replicas, EXACT, layout.megatron, policy_knobs, rates)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    exchanges = Exchanges(trainer, stage)
    formulae = Formulae(exchanges, batch, layout)
    found: dict[str, Any] = {}

    def phase(name: str, formula: dict[str, int]) -> None:
        found[name] = {
            "counted": counted.take(),
            "formula": {k: v for k, v in formula.items() if v},
        }

    counted.take()
    ref = reference.logprobs(batch)
    phase("reference", formulae.forward(frozen, batch))
    old = policy.old_logprobs(batch)
    order = policy._order(batch)
    later = batch.select(order[rows // MINI_BATCHES :])
    phase("score", formulae.forward(policy.engine, later))
    scored = ScoredBatch(batch, old, ref)
    prm.update(scored)
    phase("update_prm", formulae.update(prm.engine, torch.arange(rows)))
    advantages = torch.where(batch.response_mask, 1.0, 0.0)
    if layout.critic:
        own, knobs = shape.as_critic(), CriticSection(**common)
        critic = MegatronCritic(engine_of(own, layout, knobs), knobs, Guard(config, "critic"))
        counted.take()  # what building it exchanged
        critic.update(ValueBatch(batch, critic.values(batch), advantages, advantages))
        of_critic = replace(formulae, exchanges=Exchanges(replace(trainer, shape=own), stage))
        asked, taught = critic.engine, torch.arange(rows)
        phase("update_critic", of_critic.forward(asked, batch) + of_critic.update(asked, taught))
    policy.update(TrainBatch(scored, None, advantages))
    phase("update_policy", formulae.update(policy.engine, order))
    found["update_policy"]["planner"] = planned(trainer, stage, batch)
    sync, sent = reshard(policy, layout)
    sync()
    phase("sync_weights", {"ranks send": sent})
    return found


def engine_of(shape: ModelShape, layout: Layout, knobs: Any) -> TrainableEngine:
    """With the distributed optimizer where the layout asks for it, as on a GPU."""
    chunks = build_model(shape, EXACT, layout.megatron)
    plain = training.DistributedDataParallelConfig, training.make_optimizer
    if layout.distributed_optimizer:
        training.DistributedDataParallelConfig = lambda **options: plain[0](
            **{**options, "use_distributed_optimizer": True}
        )
        training.make_optimizer = lambda chunks, knobs, precision, _: plain[1](
            chunks, knobs, precision, True
        )
    try:
        return TrainableEngine(chunks, shape, knobs, 1.0, 1, EXACT)
    finally:
        training.DistributedDataParallelConfig, training.make_optimizer = plain


@dataclass(frozen=True, slots=True)
class Formulae:
    """Of a phase: Megatron's, and what this project tells all ranks."""

    exchanges: Exchanges
    batch: RolloutBatch
    layout: Layout

    def forward(self, engine: Engine, batch: RolloutBatch) -> Counter[str]:
        packs = packs_of(engine, batch, range(len(batch.sequences)))
        return self.exchanges.forward(packs) + told(batch)

    def update(self, engine: TrainableEngine, order: torch.Tensor) -> Counter[str]:
        found: Counter[str] = Counter()
        for rows in order.split(len(order) // MINI_BATCHES):
            packs = packs_of(engine, self.batch, rows.tolist())
            found += self.exchanges.update(packs, self.layout.distributed_optimizer)
            found += told(self.batch, flags=1)
        return found


def told(batch: RolloutBatch, flags: int = 0) -> Counter[str]:
    """Log-probs and entropies [2, N, T] in fp32, a loss in fp64, and whether all is finite."""
    if dist.get_world_size() == 1:
        return Counter()
    return Counter({"world all_reduce": 2 * 4 * batch.response_mask.numel() + 8 + 4 * flags})


def planned(trainer: Trainer, stage: int, batch: RolloutBatch) -> dict[str, float]:
    """What `planner/training.py` takes its seconds of an update from."""
    sizes, tokens = trainer.sizes, sum(len(one.token_ids) for one in batch.sequences)
    load = Load(tokens / trainer.data_parallel, 0.0, 0.0)
    gradients, weights = trainer.shard_bytes()
    sends = 2 * sizes.vpp - (stage == 0) - (stage == sizes.pp - 1)
    return {
        "tp": sum(trainer.tensor_bytes(load, backward) for backward in (False, True)),
        "ranks": trainer.handed_bytes(load) * sends if sizes.pp > 1 else 0.0,
        "dp": MINI_BATCHES * (gradients + weights),
    }


def packs_of(engine: Engine, batch: RolloutBatch, rows: Any) -> list[Pack]:
    """The micro-batches of this rank, as far as sizes go."""
    return [
        Pack(one.tokens.shape[1], len(one.targets), len(one.rows) * one.width)
        for one in cut(batch.sequences, list(rows), engine.max_tokens, engine.grid)
    ]


def rollouts(rows: int, vocabulary: int, equal: bool) -> RolloutBatch:
    """Ragged ones, the same on every rank; as many tokens per rank however many ranks there are."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(8, 32 if equal else 12 + 4 * (row % ROWS_PER_RANK)) for row in range(rows)]
    sequences = tuple(
        TokenSequence(
            tuple(torch.randint(0, vocabulary, (p + r,), generator=generator).tolist()), p
        )
        for p, r in lengths
    )
    responses = torch.tensor([r for _, r in lengths])
    mask = torch.arange(int(responses.max())) < responses[:, None]
    outcomes = (torch.arange(rows) % 2).float()
    return RolloutBatch(sequences, GROUP, mask, outcomes, -5.7 * mask.float())


def reshard(policy: MegatronPolicy, layout: Layout) -> tuple[Any, int]:
    """A weight sync into servers of TP 1, and the bytes that its plan has this rank send."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shape = policy.engine.shape
    training_layout = TrainingLayout(layout.sizes, world)
    plan = make_plan(shape, training_layout, EngineLayout(1, world), 4, 1 << 20, 8)
    mover, source = Reshard(plan, rank, torch.float32), policy.weights()
    buffer = torch.zeros(max(1, plan.buffer_bytes), dtype=torch.uint8)

    def sync() -> None:
        mover.begin(source)
        for number in range(len(plan.rounds)):
            mover.round(number, source, buffer, range(world))

    messages = [one for number in range(len(plan.rounds)) for one in plan.messages(number)]
    return sync, sum(m.nbytes for m in messages if m.sender == rank != m.receiver)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
