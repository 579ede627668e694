"""What the ranks of test_critic_ranks.py do: a critic in every layout, its values and updates.

`python -m torch.distributed.run --nproc-per-node=4 critic_cases.py FOLDER`
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from guards import guard  # noqa: E402
from layouts import LAYOUTS, megatron_options  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from megatron_prime.config import CriticSection, ParallelSizes, PrecisionOptions  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.critic import MegatronCritic  # noqa: E402
from megatron_prime.models.engine import Engine, Forward  # noqa: E402
from megatron_prime.models.guard import load_batch, load_weights  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.compat import megatron_calls, save_in_process  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import RolloutBatch, TokenSequence  # noqa: E402
from megatron_prime.value_batch import ValueBatch  # noqa: E402
from megatron_prime.weights.export import export_hf  # noqa: E402
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402

TIMEOUT_S = 120
UPDATES = 2
EXPORTED = "tp2-pp2"
EXACT = PrecisionOptions(dtype="fp32")


def main(folder: Path) -> None:
    distributed.initialize(rendezvous_from(os.environ), ParallelSizes(), 1, TIMEOUT_S)
    save_in_process()
    job = torch.load(folder / "job.pt", weights_only=False)
    for layout, sizes in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        for name in job["models"]:
            for parallel in (False, True) if sizes.tp > 1 else (False,):
                shown = f"{layout}{'-sp' * parallel}"
                if (name, shown) not in job["cases"]:
                    continue
                case = Case(folder, name, sizes, job, parallel)
                result = case.result(layout == EXPORTED and not parallel)
                if dist.get_rank() == 0:
                    torch.save(result, folder / f"{name}-{shown}.pt")
                dist.barrier()
    distributed.destroy()


class Case:
    """One model in one layout."""

    def __init__(
        self, folder: Path, name: str, sizes: ParallelSizes, job: dict[str, Any], parallel: bool
    ) -> None:
        self.folder, self.name, self.job = folder, name, job
        self.plain, self.hf_dir = folder / name, folder / f"{name}_critic"
        self.shape = ModelShape.from_hf(self.hf_dir, sizes.tp).as_critic()
        self.options = {**megatron_options(sizes), "sequence_parallel": parallel}
        self.knobs = CriticSection.model_validate(job["knobs"])
        sequences = tuple(TokenSequence(tuple(ids), prompt) for ids, prompt in job["sequences"])
        lengths = torch.tensor([sequence.response_length for sequence in sequences])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        nothing = torch.zeros(mask.shape)
        self.rollouts = RolloutBatch(sequences, 4, mask, torch.zeros(len(mask)), nothing)

    def model(self, hf_dir: Path, precision: PrecisionOptions = EXACT) -> Any:
        chunks = build_model(self.shape, precision, self.options)
        load_hf(chunks, hf_dir, self.shape)
        return chunks

    def engine(self, precision: PrecisionOptions = EXACT) -> TrainableEngine:
        chunks = self.model(self.hf_dir, precision)
        return TrainableEngine(chunks, self.shape, self.knobs, 1.0, UPDATES, precision)

    def critic(self, engine: TrainableEngine) -> MegatronCritic:
        return MegatronCritic(engine, self.knobs, guard(self.folder / "guard", "critic"))

    def result(self, export: bool) -> dict[str, Any]:
        untaught = Engine(self.model(self.plain), self.shape, 40, 1.0)
        critic = self.critic(self.engine())
        found = self.learn(critic)
        found["untaught"] = untaught.logprobs(self.rollouts.sequences)
        found["weights"] = dict(gather_hf_tensors(critic.engine.modules, self.shape))
        half = PrecisionOptions(dtype="bf16")
        found["bf16"] = self.learn(self.critic(self.engine(half)))["metrics"]
        if export:
            out = self.folder / f"{self.name}_exported"
            export_hf(critic.engine.modules, self.shape, self.hf_dir, out)
            found["skipped"] = self.skip(critic)
        saved = self.folder / f"{self.name}_saved"
        if not saved.exists():  # the first layout
            dist.barrier()
            if dist.get_rank() == 0:
                saved.mkdir()
            dist.barrier()
            with megatron_calls():
                dist_checkpointing.save(critic.engine.sharded_state_dict(False), str(saved))
        dist.barrier()
        other = self.engine()
        with megatron_calls():
            wanted = other.sharded_state_dict(is_loading=True)
            other.load_state_dict(dist_checkpointing.load(wanted, str(saved)))
        found["loaded"] = dict(gather_hf_tensors(other.modules, self.shape))
        found["goes_on"] = self.critic(other).update(self.batch(found["values"][0]))
        return found

    def batch(self, values: torch.Tensor) -> ValueBatch:
        return ValueBatch(self.rollouts, values, self.job["returns"], self.job["to_come"])

    def learn(self, critic: MegatronCritic) -> dict[str, Any]:
        values, metrics = [], []
        for _ in range(UPDATES):
            values.append(critic.values(self.rollouts))
            metrics.append(critic.update(self.batch(values[-1])))
        return {"values": values, "metrics": metrics}

    def skip(self, critic: MegatronCritic) -> dict[str, Any]:
        """A step that a guard skips, and whether a model takes over what it kept."""

        def loss(forward: Forward) -> torch.Tensor:
            return forward.values.sum() * math.nan

        folder = self.folder / f"{self.name}_broken"
        keeper, rows = guard(folder, "critic", self.hf_dir, on_not_finite="skip"), [3, 1, 2, 5]
        batch = self.batch(self.job["returns"] + 1)
        step = keeper.train_step(critic.engine, batch, torch.tensor(rows), loss)
        (saved,) = (folder / "not_finite").iterdir()
        before = dict(gather_hf_tensors(critic.engine.modules, self.shape))
        for module in critic.engine.modules:
            for parameter in module.parameters():
                parameter.data.zero_()
        load_weights(critic.engine, saved)
        after = dict(gather_hf_tensors(critic.engine.modules, self.shape))
        kept = load_batch(saved)
        return {
            "step": step,
            "kept": kept,
            "restored": all(torch.equal(after[name], before[name]) for name in before),
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
