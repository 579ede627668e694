"""Stage 1, models: Megatron with local and with Transformer Engine layers, against plain torch.

The truth is `transformers` on the CPU in fp32. What bf16 may differ by is measured as well: the
same model in bf16, once more on the CPU, by other kernels. Updates are held against AdamW.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from plain import PlainModel
from session import run_config
from stage_colocated import one_session
from stage_measure import peak_of
from stage_report import NO_CUDA, Stage
from stage_sizes import rows_of
from torch import Tensor
from update import compare, larger_model, train_batch

from megatron_prime.config import RunConfig
from megatron_prime.types import RolloutBatch
from megatron_prime.weights.shape import ModelShape

EXACT = 1e-4  # nats, fp32 against fp32 by other kernels
NOISE = 3.0  # bf16 may be as often as far away as transformers' bf16 on a CPU
SAME_GRADIENTS = 1e-4  # of the gradient's norm, recomputed or not, fp32
RECOMPUTE = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


def sizes(stage: Stage) -> tuple[int, int, int]:
    """Hidden, layers, vocabulary."""
    return (128, 2, 256) if stage.small else (1024, 4, 8192)


def implementations(stage: Stage) -> list[str]:
    """Those that can run here; the others are skipped."""
    found = ["local"]
    if not stage.on_gpu:
        stage.skip("Transformer Engine's layers", "", NO_CUDA)
    elif find_spec("transformer_engine") is None:
        stage.skip("Transformer Engine's layers", "", "Transformer Engine is not installed")
    else:
        found.append("transformer_engine")
    return found


def config_with(
    model: Path, folder: Path, dtype: str, implementation: str, **megatron: Any
) -> RunConfig:
    """The benchmarks' run, in another number format and with other options of Megatron's."""
    plain = run_config(folder, model).model_dump(exclude={"advantage"}, exclude_unset=True)
    formats = {name: {"dtype": dtype} for name in ("policy", "prm", "reference")}
    options = {"transformer_impl": implementation, **megatron}
    policy = plain["policy"] | {"mini_batch_size": 16, "micro_batch_tokens": 1024}
    return RunConfig.model_validate(
        plain | {"precision": formats, "megatron": options, "policy": policy}
    )


def policy_in(config: RunConfig) -> Any:
    """The policy at its start; a session must stand."""
    from megatron_prime.models.factory import policy_of

    return policy_of(config)


def apart(found: Tensor, wanted: Tensor, batch: RolloutBatch) -> float:
    """Mean distance of the response tokens' log-probs, in nats."""
    return float((found - wanted).abs()[batch.response_mask].mean())


def truths(model: Path, batch: RolloutBatch, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Log-probs on the CPU: in fp32, and by a bf16 copy."""
    plain = PlainModel(model, config.policy)
    exact = plain.logprobs(batch)
    plain.model.to(torch.bfloat16)
    return exact, plain.logprobs(batch).float()


def logprobs(stage: Stage, model: Path, implementation: str) -> None:
    """fp32 and bf16, packed and one row at a time."""
    shape = ModelShape.from_hf(model)
    batch = rows_of(shape, 16, 24, 64 if stage.small else 232, 4)
    first = config_with(model, stage.scratch / "models", "fp32", implementation)
    exact, rough = truths(model, batch, first)
    noise = apart(rough, exact, batch)
    with one_session(first):
        for dtype, bound in (("fp32", EXACT), ("bf16", NOISE * noise)):
            if dtype == "fp32" and implementation == "transformer_engine":
                continue  # its fused attention has bf16 and fp16 only
            config = config_with(model, stage.scratch / "models", dtype, implementation)
            engine = policy_in(config).engine
            packed = engine.logprobs(batch.sequences)
            name = f"{implementation} layers, {dtype}: log-probs against transformers in fp32"
            stage.at_most(name, apart(packed, exact, batch), bound, "nats")
            alone = torch.zeros_like(packed)
            for row, sequence in enumerate(batch.sequences):
                alone[row, : sequence.response_length] = engine.logprobs([sequence])[0]
            name = f"{implementation} layers, {dtype}: a pack against its rows one by one"
            stage.at_most(name, apart(packed, alone, batch), bound, "nats")


def training_step(stage: Stage, model: Path, implementation: str) -> None:
    """An update on this device against AdamW on the CPU, in fp32 (TE: the loss, in bf16)."""
    shape = ModelShape.from_hf(model)
    batch = rows_of(shape, 16, 24, 64 if stage.small else 232, 4)
    dtype = "fp32" if implementation == "local" else "bf16"
    config = config_with(model, stage.scratch / "models", dtype, implementation)
    theirs = PlainModel(model, config.policy)
    start = {name: tensor.clone() for name, tensor in theirs.model.state_dict().items()}
    given = train_batch(batch, theirs.logprobs(batch))
    with one_session(config):
        ours = policy_in(config)
        metrics = ours.update(given).metrics
        loss = theirs.update(given)
        bound = 1e-4 if dtype == "fp32" else 0.02
        stage.at_most(
            f"{implementation} layers, {dtype}: the update's loss against AdamW on the CPU",
            abs(metrics["policy/loss"] - loss),
            bound,
        )
        if dtype == "fp32":
            weights = {name: tensor.cpu() for name, tensor in ours.weights().whole()}
            name = f"{implementation} layers, fp32: weights after a step, of their movement"
            stage.at_most(name, compare(weights, theirs.model.state_dict(), start), 0.01)


def recompute(stage: Stage, model: Path, implementation: str) -> None:
    """Gradients with and without recomputed activations."""
    shape = ModelShape.from_hf(model)
    batch = rows_of(shape, 16, 24, 64 if stage.small else 232, 4)
    dtype = "fp32" if implementation == "local" else "bf16"
    bound = SAME_GRADIENTS if dtype == "fp32" else 0.01
    norms, peaks = {}, {}
    plain = config_with(model, stage.scratch / "models", dtype, implementation)
    with one_session(plain):
        for name, options in {"none": {}, **RECOMPUTE}.items():
            config = config_with(model, stage.scratch / "models", dtype, implementation, **options)
            policy = policy_in(config)
            given = train_batch(batch, policy.logprobs(batch))
            norms[name] = policy.update(given).metrics["policy/grad_norm"]
            peaks[name] = peak_of(partial(policy.update, given))
    for name in RECOMPUTE:
        difference = abs(norms[name] / norms["none"] - 1)
        stage.at_most(
            f"{implementation} layers, {dtype}: gradient norm, recompute {name}", difference, bound
        )
        less = peaks[name] / max(1, peaks["none"])
        stage.on_cuda(f"{implementation} layers: peak, recompute {name}", less, "%", most=1.0)


def kernels(stage: Stage) -> None:
    """Which optimizer and norms a run here has."""
    from megatron_prime.models.kernels import kernels_line

    stage.measured("kernels", kernels_line())


def main(arguments: list[str] | None = None) -> int:
    """All checks of the stage."""
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    stage = Stage.of_arguments("models", arguments)
    if stage.on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = False
    stage.part("kernels", 1, kernels)
    model = larger_model(stage.scratch, *sizes(stage))
    for implementation in implementations(stage):
        stage.part(f"{implementation}: log-probs", 10, logprobs, model, implementation)
        stage.part(f"{implementation}: a step", 10, training_step, model, implementation)
        stage.part(f"{implementation}: recompute", 8, recompute, model, implementation)
    return stage.finish()


if __name__ == "__main__":
    sys.exit(main())
