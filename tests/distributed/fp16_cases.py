"""What the two ranks of test_fp16.py do: train in three types, provoke overflows, resume.

`python -m torch.distributed.run --nproc-per-node=2 fp16_cases.py FOLDER`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from guards import guard  # noqa: E402
from layouts import megatron_options  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from training_cases import rollout_batch  # noqa: E402

from megatron_prime.config import ParallelSizes, PolicySection, PrecisionOptions, PrmSection  # noqa: E402
from megatron_prime.errors import NotFinite  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.engine import Engine, Forward  # noqa: E402
from megatron_prime.models.policy import MegatronPolicy  # noqa: E402
from megatron_prime.models.prm import MegatronPrm  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.compat import megatron_calls, save_in_process  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import OldLogprobs, ScoredBatch, TrainBatch  # noqa: E402
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402

LAYOUTS = {  # the other ranks are data-parallel
    "dp2": ParallelSizes(),
    "tp2": ParallelSizes(tp=2),
    "pp2": ParallelSizes(pp=2),
    "pp2-vpp2": ParallelSizes(pp=2, vpp=2),
    "cp2": ParallelSizes(cp=2),
}
TIMEOUT_S = 120
UPDATES = 2
HUGE = 1e12  # times a gradient of about 0.1 and a scale of at least 4: beyond 65504


def main(folder: Path) -> None:
    distributed.initialize(rendezvous_from(os.environ), LAYOUTS["dp2"], 1, TIMEOUT_S)
    save_in_process()
    job = torch.load(folder / "job.pt", weights_only=False)
    for layout, sizes in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        cases = Cases(folder, job, layout, sizes)
        result = {
            "trained": {dtype: cases.train(dtype) for dtype in ("fp32", "bf16", "fp16")},
            "overflow": cases.overflow(),
            "refused": cases.refused(),
            "policy": cases.skipped_policy_update(),
            "broken_weights": cases.broken_weights(),
        }
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{layout}.pt")
        dist.barrier()
    distributed.destroy()


class Cases:
    """The cases of one layout."""

    def __init__(
        self, folder: Path, job: dict[str, Any], layout: str, sizes: ParallelSizes
    ) -> None:
        self.folder, self.job = folder / f"checkpoint-{layout}", job
        self.hf_dir = folder / "tied"
        self.shape = ModelShape.from_hf(self.hf_dir, sizes.tp)
        self.megatron = megatron_options(sizes)
        self.rollouts = rollout_batch(job)
        self.prm = PrmSection.model_validate(job["prm"])

    def engine(self, **options: Any) -> TrainableEngine:
        precision = PrecisionOptions(**{"dtype": "fp16", "hysteresis": 1, **options})
        return TrainableEngine(self.model(precision), self.shape, self.prm, 1.0, UPDATES, precision)

    def model(self, precision: PrecisionOptions) -> Any:
        model = build_model(self.shape, precision, self.megatron)
        load_hf(model, self.hf_dir, self.shape)
        return model

    def scored(self) -> ScoredBatch:
        exact = self.model(PrecisionOptions(dtype="fp32"))
        ref = Engine(exact, self.shape, self.prm.micro_batch_tokens, 1.0).logprobs(
            self.rollouts.sequences
        )
        return ScoredBatch(self.rollouts, OldLogprobs.none(self.rollouts), ref)

    def train(self, dtype: str) -> dict[str, Any]:
        """PRM updates; weights, figures and the optimizer's own types."""
        engine = self.engine(dtype=dtype)
        prm, scored = MegatronPrm(engine, self.prm, guard(self.folder, "prm")), self.scored()
        start = self.weights(engine)
        updates = [prm.update(scored) for _ in range(UPDATES)]
        return {
            "start": start,
            "weights": self.weights(engine),
            "metrics": [update.metrics for update in updates],
            "masters": {p.dtype for g in engine.optimizer.param_groups for p in g["params"]},
        }

    def weights(self, engine: TrainableEngine) -> dict[str, torch.Tensor]:
        return {n: t.clone() for n, t in gather_hf_tensors(engine.modules, self.shape)}

    def step(self, engine: TrainableEngine, factor: float = 1.0) -> Any:
        """One optimizer step on a loss of `factor` times the negative mean log-prob."""
        rows = range(len(self.rollouts.sequences))

        def loss(forward: Forward) -> torch.Tensor:
            mask = self.rollouts.response_mask[forward.rows][:, : forward.logprobs.shape[1]]
            return -factor * torch.where(mask, forward.logprobs, 0.0).sum() / len(rows)

        engine.next_rate()
        return engine.train_step(self.rollouts.sequences, rows, loss)

    def overflow(self) -> dict[str, Any]:
        """A step that overflows, a good one, a checkpoint, and the next step with and without."""
        engine = self.engine(initial_loss_scale=256.0)
        before = self.weights(engine)
        skipped = self.step(engine, HUGE)
        after_skip = self.weights(engine)
        trained = self.step(engine)
        after_step = self.weights(engine)
        if dist.get_rank() == 0:
            self.folder.mkdir()
        dist.barrier()
        resumed = self.engine(initial_loss_scale=256.0)
        with megatron_calls():
            dist_checkpointing.save(engine.sharded_state_dict(is_loading=False), str(self.folder))
            wanted = resumed.sharded_state_dict(is_loading=True)
            resumed.load_state_dict(dist_checkpointing.load(wanted, str(self.folder)))
        last, again = self.step(engine), self.step(resumed)
        return {
            "steps": [(s.updated, s.loss_scale, s.grad_norm, s.loss) for s in (skipped, trained)],
            "unchanged": same(before, after_skip),
            "moved": not same(before, after_step),
            "resumed": (again.loss_scale, last.loss_scale, again.grad_norm == last.grad_norm),
            "same_after_resume": same(self.weights(engine), self.weights(resumed)),
        }

    def refused(self) -> dict[str, tuple[str, bool]]:
        """Overflows that no smaller scale can mend: the error, and whether weights stayed."""
        lowered = self.engine(min_loss_scale=4.0)
        lowered.set_loss_scale(4.0)  # as a replay does
        cases = {
            "lowered": (lowered, HUGE),
            "smallest": (self.engine(initial_loss_scale=4.0, min_loss_scale=4.0), HUGE),
            "fixed": (self.engine(loss_scale=64.0), HUGE),
            "nan": (self.engine(), float("nan")),
        }
        found = {}
        for name, (engine, factor) in cases.items():
            before = self.weights(engine)
            try:
                self.step(engine, factor)
                error = "no error"
            except NotFinite as raised:
                error = str(raised)
            found[name] = (error, same(before, self.weights(engine)))
        return found

    def broken_weights(self) -> tuple[list[str], bool, list[str]]:
        """Names before and after a finite step whose weights are beyond fp16's range."""
        precision = PrecisionOptions(dtype="fp16")
        knobs = self.prm.model_copy(update={"lr": 1e8})
        model = self.model(precision)
        engine = TrainableEngine(model, self.shape, knobs, 1.0, UPDATES, precision)
        before = engine.broken_weights()
        return before, self.step(engine).updated, engine.broken_weights()

    def skipped_policy_update(self) -> dict[str, Any]:
        """A policy whose every step overflows keeps its version; one good update raises it."""
        knobs = PolicySection.model_validate(self.job["policy"]["tied"])
        precision = PrecisionOptions(dtype="fp16", hysteresis=1)
        engine = TrainableEngine(
            self.model(precision), self.shape, knobs, self.job["temperature"], UPDATES, precision
        )
        policy = MegatronPolicy(engine, knobs, 0, guard(self.folder, "policy"))
        ref = self.rollouts.rollout_logprobs  # any will do
        scored = ScoredBatch(self.rollouts, policy.old_logprobs(self.rollouts), ref)
        skipped = policy.update(TrainBatch(scored, None, self.job["advantages"] * HUGE))
        version = policy.version
        good = policy.update(TrainBatch(scored, None, self.job["advantages"]))
        versions = (version, policy.version)
        return {"skipped": skipped.metrics, "good": good.metrics, "versions": versions}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
