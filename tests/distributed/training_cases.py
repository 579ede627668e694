"""What the ranks of test_training.py do: train tiny models in every layout, save the weights.

`python -m torch.distributed.run --nproc-per-node=N training_cases.py FOLDER`, N four or eight
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from guards import guard  # noqa: E402
from layouts import LAYOUTS, OF_EIGHT, megatron_options  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_prime.config import (  # noqa: E402
    ParallelSizes,
    PolicySection,
    PrecisionOptions,
    PrmSection,
)
from megatron_prime.errors import NotFinite  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.engine import Engine, Forward  # noqa: E402
from megatron_prime.models.guard import (  # noqa: E402
    KEPT,
    load_batch,
    load_weights,
    rollouts_of,
)
from megatron_prime.models.policy import MegatronPolicy  # noqa: E402
from megatron_prime.models.prm import MegatronPrm  # noqa: E402
from megatron_prime.models.reference import MegatronReference  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import (  # noqa: E402
    OldLogprobs,
    RolloutBatch,
    ScoredBatch,
    TokenSequence,
    TrainBatch,
)
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402

TIMEOUT_S = 120
UPDATES = 2
SCORED_TWICE = (ParallelSizes(tp=2), ParallelSizes(pp=2))
COMPARED = (ParallelSizes(), ParallelSizes(tp=2), ParallelSizes(pp=2))  # by the other PRM losses


def main(folder: Path) -> None:
    distributed.initialize(rendezvous_from(os.environ), ParallelSizes(), 1, TIMEOUT_S)
    job = torch.load(folder / "job.pt", weights_only=False)
    for layout, sizes in (LAYOUTS if dist.get_world_size() == 4 else OF_EIGHT).items():
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        for name in job["policy"]:
            if layout in LAYOUTS and (name, layout) not in job["cases"]:
                continue
            result = train(folder / name, job, sizes)
            if dist.get_rank() == 0:
                torch.save(result, folder / f"{name}-{layout}.pt")
            dist.barrier()
    distributed.destroy()


def train(hf_dir: Path, job: dict[str, Any], sizes: ParallelSizes) -> dict[str, Any]:
    """Two PRM and two policy updates on the same rollouts; weights, figures and log-probs."""
    shape = ModelShape.from_hf(hf_dir, sizes.tp)
    sequence_parallel = sizes.tp > 1 and hf_dir.name in ("untied", "qwen3")
    options = {**megatron_options(sizes), "sequence_parallel": sequence_parallel}

    exact, half = PrecisionOptions(dtype="fp32"), PrecisionOptions(dtype="bf16")

    def model(precision: PrecisionOptions = exact) -> Any:
        built = build_model(shape, precision, options)
        load_hf(built, hf_dir, shape)
        return built

    policy_knobs = PolicySection.model_validate(job["policy"][hf_dir.name])
    prm_knobs = PrmSection.model_validate(job["prm"])
    policy = MegatronPolicy(
        TrainableEngine(model(), shape, policy_knobs, job["temperature"], UPDATES, exact),
        policy_knobs,
        seed=job["seed"],
        guard=guard(hf_dir, "policy"),
    )
    of_prm = guard(hf_dir, "prm")
    prm_engine = TrainableEngine(model(), shape, prm_knobs, 1.0, UPDATES, exact)
    prm = MegatronPrm(prm_engine, prm_knobs, of_prm)
    reference = MegatronReference(Engine(model(), shape, prm_knobs.micro_batch_tokens, 1.0), of_prm)

    rollouts = rollout_batch(job)
    ref = reference.logprobs(rollouts)
    scored = ScoredBatch(rollouts, policy.old_logprobs(rollouts), ref)
    updates = [prm.update(scored) for _ in range(UPDATES)]
    trained = policy.update(TrainBatch(scored, None, job["advantages"]))
    # The second update starts from the same old log-probs, all of which are known by now.
    whole = OldLogprobs.scored(
        rollouts, torch.arange(len(rollouts.sequences)), trained.old_logprobs
    )
    again = policy.update(TrainBatch(replace(scored, old_logprobs=whole), None, job["advantages"]))
    weights = dict(gather_hf_tensors(policy.engine.modules, shape))
    scoring = {}
    if sizes in SCORED_TWICE:
        for what in ("all rows", "later rows"):
            engine = TrainableEngine(model(), shape, policy_knobs, job["temperature"], 1, exact)
            other = MegatronPolicy(engine, policy_knobs, job["seed"], guard(hf_dir, "policy"))
            scoring[what] = first_update(other, job, what == "all rows")
    compared = {}
    if sizes in COMPARED:
        for prm_loss in job["compared"][hf_dir.name]:
            knobs = prm_knobs.model_copy(update={"loss": prm_loss})
            engine = TrainableEngine(model(), shape, knobs, 1.0, UPDATES, exact)
            other, verdicts = MegatronPrm(engine, knobs, of_prm), job["verdicts"]
            judged = replace(scored, rollouts=replace(rollouts, outcome_rewards=verdicts))
            found = [other.update(judged).metrics for _ in range(UPDATES)]
            compared[prm_loss] = (found, dict(gather_hf_tensors(engine.modules, shape)))
    halves = TrainableEngine(model(half), shape, prm_knobs, 1.0, UPDATES, half)
    half_updates = [MegatronPrm(halves, prm_knobs, of_prm).update(scored) for _ in range(UPDATES)]
    return {
        "policy": weights,
        "prm": dict(gather_hf_tensors(prm.engine.modules, shape)),
        "ref_logprobs": ref,
        "old_logprobs": trained.old_logprobs,
        "scored_rows": int(scored.old_logprobs.known.sum()),
        "prm_forward": [update.forward_logprobs for update in updates],
        "prm_metrics": [update.metrics for update in updates],
        "policy_metrics": [trained.metrics, again.metrics],
        "version": policy.version,
        "scoring": scoring,
        "compared": compared,
        "bf16": dict(gather_hf_tensors(halves.modules, shape)),
        "bf16_metrics": [update.metrics for update in half_updates],
        "masters": {p.dtype for g in halves.optimizer.param_groups for p in g["params"]},
        "broken": broken_step(halves, rollouts),
        "skipped": skipped_step(prm_engine, scored, hf_dir, f"broken-{sizes}"),
    }


def first_update(policy: MegatronPolicy, job: dict[str, Any], score_all: bool) -> dict[str, Any]:
    """Weights and figures after an update whose first mini-batch was scored, or was not."""
    rollouts = rollout_batch(job)
    old = policy.old_logprobs(rollouts)
    if score_all:
        everyone = torch.arange(len(rollouts.sequences))
        old = OldLogprobs.scored(rollouts, everyone, policy.logprobs(rollouts))
    scored = ScoredBatch(rollouts, old, rollouts.rollout_logprobs)  # any reference will do
    update = policy.update(TrainBatch(scored, None, job["advantages"]))
    weights = dict(gather_hf_tensors(policy.engine.modules, policy.engine.shape))
    return {"weights": weights, "old": update.old_logprobs, "metrics": update.metrics}


def broken_step(engine: TrainableEngine, rollouts: RolloutBatch) -> tuple[str, bool]:
    """A step with one infinite loss on one replica: its error, and whether weights stayed."""
    before = [p.detach().clone() for module in engine.modules for p in module.parameters()]

    def loss(forward: Forward) -> torch.Tensor:
        return (forward.logprobs * torch.where(forward.rows == 0, math.inf, 1.0)[:, None]).sum()

    try:
        engine.train_step(rollouts.sequences, range(len(rollouts.sequences)), loss)
    except NotFinite as error:
        after = [p for module in engine.modules for p in module.parameters()]
        return str(error), all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return "no error", False


def skipped_step(
    engine: TrainableEngine, scored: ScoredBatch, hf_dir: Path, name: str
) -> dict[str, Any]:
    """A step that a guard skips: what it kept, and whether a model takes it over again."""

    def loss(forward: Forward) -> torch.Tensor:
        return forward.logprobs.sum() * math.nan

    folder, rows = hf_dir / name, torch.tensor([3, 1, 2, 5])
    keeper = guard(folder, "prm", hf_dir, on_not_finite="skip")
    steps = [keeper.train_step(engine, scored, rows, loss) for _ in range(KEPT + 1)]
    before = [p.detach().clone() for module in engine.modules for p in module.parameters()]
    for module in engine.modules:
        for parameter in module.parameters():
            parameter.data.zero_()
    saved = sorted((folder / "not_finite").iterdir())
    load_weights(engine, saved[0])
    after = [p for module in engine.modules for p in module.parameters()]
    kept = load_batch(saved[0])
    try:
        all_skipped = str(keeper.end_update(0))
    except NotFinite as error:
        all_skipped = str(error)
    steps.append(keeper.train_step(engine, scored, rows, loss))
    return {
        "steps": steps,
        "all_skipped": all_skipped,
        "figures": keeper.end_update(1),
        "saved": [path.name for path in saved],
        "model": kept.model,
        "sequences": rollouts_of(kept.batch).sequences,
        "ref": kept.batch.ref_logprobs,
        "restored": all(torch.equal(a, b) for a, b in zip(after, before, strict=True)),
    }


def rollout_batch(job: dict[str, Any]) -> RolloutBatch:
    sequences = tuple(TokenSequence(tuple(ids), prompt) for ids, prompt in job["sequences"])
    lengths = torch.tensor([sequence.response_length for sequence in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    engine = job.get("rollout_logprobs", torch.zeros(mask.shape))
    return RolloutBatch(sequences, job["group_size"], mask, job["outcomes"], engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
