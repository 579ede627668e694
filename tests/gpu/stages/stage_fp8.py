"""Stage 2, FP8: each recipe of Transformer Engine that this chip has, beside bf16.

Log-probs, gradients, weights in and out: tests/gpu/test_fp8.py, against an emulation on the CPU.
Here: the loss curve of the quickstart's fine-tuning and the accuracy curve of its PRIME stage,
memory and tokens per second at the shapes of real models, and rollouts from FP8 weights. On a CPU
the same code sets bf16 beside fp32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from stage_colocated import as_batch, colocated
from stage_engine import config_for as engine_config
from stage_jobs import (
    EVERY_PROMPT,
    FEW_PROMPTS,
    ONE_RANK,
    ROOT,
    command,
    make_quickstart,
    metrics,
    run,
)
from stage_measure import GIB
from stage_pytest import run_file
from stage_report import NO_CUDA, Stage
from stage_sizes import MODELS, model_folder, sglang_missing, shapes_of
from stage_update import config_for as update_config
from stage_update import figures

from megatron_prime.config import PrecisionOptions
from megatron_prime.protocols import Phase

Format = dict[str, Any]
RECIPES = ("tensorwise", "blockwise", "delayed", "mxfp8")  # the most useful here first
QUICKSTART = ROOT / "examples" / "quickstart"
LAST = 10  # steps of a curve whose mean is its end
LEARNT = 0.95  # of what bf16 has learnt
FEW = ("--train", "64", "--test", "8", "--sft", "512")


def baseline(stage: Stage) -> tuple[str, Format]:
    """What the others are set beside."""
    return ("bf16", {"dtype": "bf16"}) if stage.on_gpu else ("fp32", {"dtype": "fp32"})


def formats(stage: Stage) -> dict[str, Format]:
    """All that this chip has; on a CPU bf16."""
    from megatron_prime.models.precision import Chip, chip_problems

    if not stage.on_gpu:
        for recipe in RECIPES:
            stage.skip(f"FP8, {recipe}", "", NO_CUDA)
        return {"bf16": {"dtype": "bf16"}}
    found: dict[str, Format] = {}
    for recipe in RECIPES:
        options = {"dtype": "bf16", "fp8": "hybrid", "fp8_recipe": recipe}
        if problems := list(chip_problems("policy", PrecisionOptions(**options), Chip.here())):
            stage.skip(f"FP8, {recipe}", "", problems[0])
            continue
        found[f"{recipe}, hybrid"] = options
        if recipe == "blockwise":
            found["blockwise, e4m3"] = options | {"fp8": "e4m3"}
        if recipe != "delayed":
            found[f"{recipe}, first and last layer in bf16"] = options | {
                "first_last_layers_bf16": True
            }
    return found


# ---------------------------------------------------------------------- curves


def data(stage: Stage) -> Path:
    """The quickstart's."""
    folder = stage.scratch / "fp8"
    make_quickstart(folder / "data", *(FEW if stage.small else ()))
    return folder


def fine_tuned(
    stage: Stage, label: str, precision: Format, steps: int, output: Path | None
) -> list[float]:
    """Losses of the quickstart's fine-tuning in one format; `output`: where to keep the model."""
    folder = data(stage)
    there = run_folder(folder, f"sft {label}")
    knobs = [f"--run.folder={there}", f"--model.hf={folder / 'data' / 'model'}"]
    knobs += [f"--data.train={folder / 'data' / 'train.jsonl'}", f"--sft.steps={steps}"]
    knobs += [f"--sft.data={folder / 'data' / 'sft.jsonl'}"]
    knobs += [f"--sft.output={output or there / 'hf'}"]
    knobs += [f"--precision.policy.{name}={value}".lower() for name, value in precision.items()]
    limit = None if stage.small else max(10.0, stage.left())
    job = command("sft", QUICKSTART / "sft.toml", *knobs)
    run(job, log=stage.folder / "fp8_jobs.log", limit_s=limit)
    rows = sorted(metrics(there).items())
    return [row["sft/loss"] for _, row in rows if "sft/loss" in row]


def sft_curves(stage: Stage, others: dict[str, Format]) -> None:
    """100 steps from the same random weights; the baseline's model is PRIME's start."""
    steps, whole = (6, 6) if stage.small else (100, 320)
    name, precision = baseline(stage)
    plain = fine_tuned(stage, name, precision, whole, data(stage) / "start")[:steps]
    learnt = plain[0] - fmean(plain[-LAST // 2 :])
    stage.measured(f"SFT, {name}: loss after {steps} steps", fmean(plain[-LAST // 2 :]))
    for label, other in others.items():
        found = fine_tuned(stage, label, other, steps, None)
        stage.measured(f"SFT, {label}: loss after {steps} steps", fmean(found[-LAST // 2 :]))
        share = (found[0] - fmean(found[-LAST // 2 :])) / learnt
        stage.at_least(f"SFT, {label}: learnt, of {name}", share, LEARNT, "%")


def prime_curves(stage: Stage, others: dict[str, Format]) -> None:
    """50 steps of PRIME, all formats at once as processes of their own."""
    folder, steps = data(stage), 1 if stage.small else 50
    name, precision = baseline(stage)
    labels = {name: precision, **(dict(list(others.items())[:1]) if stage.short else others)}
    jobs = []
    for label, found in labels.items():
        knobs = [f"--run.folder={run_folder(folder, label)}", f"--model.hf={folder / 'start'}"]
        knobs += [f"--data.train={folder / 'data' / 'train.jsonl'}", f"--run.steps={steps}"]
        knobs += [f"--data.eval={folder / 'data' / 'test.jsonl'}", "--evaluate.every=0"]
        knobs += [*ONE_RANK, "--checkpoint.every=0"]
        knobs += [f"--precision.{one}.dtype={precision['dtype']}" for one in MODELS]
        knobs += [f"--precision.policy.{key}={value}".lower() for key, value in found.items()]
        knobs += [*EVERY_PROMPT, *(FEW_PROMPTS if stage.small else ())]
        jobs.append(command("train", QUICKSTART / "prime.toml", *knobs))
    limit = None if stage.small else max(10.0, stage.left())
    run(*jobs, log=stage.folder / "fp8_jobs.log", limit_s=limit)
    judge(stage, folder, list(labels), name)


def run_folder(folder: Path, label: str) -> Path:
    """Of a format's run."""
    return folder / label.replace(" ", "_").replace(",", "")


def judge(stage: Stage, folder: Path, labels: list[str], name: str) -> None:
    """Accuracy of the last steps' samples, within twice the noise of two such means."""
    ends = {}
    for label in labels:
        rows = list(metrics(run_folder(folder, label)).values())
        accuracy = [row["rollout/accuracy"] for row in rows if "rollout/accuracy" in row]
        ends[label] = fmean(accuracy[-LAST:])
        stage.measured(f"PRIME, {label}: accuracy of samples, last {LAST} steps", ends[label], "%")
    for label in labels[1:]:
        p, n = ends[name], 48 * LAST  # prompts; their four samples are alike
        bound = p - 2 * (2 * p * (1 - p) / n) ** 0.5
        if stage.small:
            stage.skip(f"PRIME, {label}: against {name}", "", "a step says nothing")
        else:
            stage.at_least(f"PRIME, {label}: accuracy, against {name}", ends[label], bound, "%")


# ---------------------------------------------------------------------- memory and speed


def sizes(stage: Stage, others: dict[str, Format], name: str, layers: int) -> None:
    """Peak of an update and tokens per second, beside the baseline."""
    base, precision = baseline(stage)
    plain = figures(stage, update_config(stage, name, layers, precision, {}))
    label = f"{name}, {layers} layers"
    stage.on_cuda(f"{label}, {base}: update", plain.update_rate, "tokens/s")
    stage.on_cuda(f"{label}, {base}: peak", plain.update_peak / GIB, "GiB")
    first = {key: one for key, one in others.items() if "bf16" not in key or not stage.on_gpu}
    kept = {f"{key}, FP8 weights only": {**one, "fp8_param": True} for key, one in first.items()}
    kept = {key: one for key, one in kept.items() if stage.on_gpu and "delayed" not in key}
    wanted = {**first, **kept}
    for key, one in list(wanted.items())[: 1 if stage.short else None]:
        if not stage.small and stage.left() < 20:
            stage.skip(f"{label}, {key}", "", "no time left")
            continue
        found = figures(stage, update_config(stage, name, layers, one, {}))
        stage.on_cuda(f"{label}, {key}: update", found.update_rate, "tokens/s")
        stage.on_cuda(f"{label}, {key}: update, of {base}'s speed", found.update_rate / plain.update_rate, "×")  # fmt: skip # noqa: E501
        stage.on_cuda(f"{label}, {key}: scoring, of {base}'s speed", plain.scoring_s / found.scoring_s, "×")  # fmt: skip # noqa: E501
        saved = (plain.update_peak - found.update_peak) / GIB
        stage.on_cuda(f"{label}, {key}: peak, less than {base}'s by", saved, "GiB")


def rollout_weights(stage: Stage) -> None:
    """The server holds FP8 weights, rounded at each sync; the trainer keeps its own."""
    if why := None if stage.on_gpu else NO_CUDA:
        stage.skip("rollouts from FP8 weights: mismatch_kl", "", why)
        return
    model = model_folder(stage, "1.5B", 8)
    with colocated(engine_config(stage, model, "fp8_rollout", fp8_weights=True)) as it:
        it.sync()
        batch = as_batch(it.generate(8))
        with it.phase(Phase.SCORE):
            found = it.mismatch(batch)
    stage.measured("rollouts from FP8 weights: mismatch_kl", found["mismatch_kl"], "nats/token")
    stage.measured("rollouts from FP8 weights: mismatch_max", found["mismatch_max"], "nats")


def main(arguments: list[str] | None = None) -> int:
    """All checks of the stage."""
    stage = Stage.of_arguments("fp8", arguments)
    from megatron_prime.runtime.compat import before_megatron_import

    before_megatron_import()
    others = formats(stage)
    stage.part("against an emulation", 30, run_file, "test_fp8.py")
    stage.part("SFT curves", 20, sft_curves, others)
    for name, layers in shapes_of(stage):
        stage.part(f"{name}, {layers} layers", 20, sizes, others, name, layers)
    if (data(stage) / "start").exists():
        stage.part("PRIME curves", 40, prime_curves, others)
    else:
        stage.skip("PRIME curves", "", "there is no fine-tuned start")
    if why := sglang_missing():
        stage.skip("rollouts from FP8 weights", "", why)
    else:
        stage.part("rollouts from FP8 weights", 40, rollout_weights)
    return stage.finish()


if __name__ == "__main__":
    sys.exit(main())
