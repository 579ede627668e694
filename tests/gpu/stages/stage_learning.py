"""Stage 6, learning: the quickstart's job on this device, its curve against those of CPUs.

What is held against it are the three seeds of examples/quickstart/README.md: where they began and
where they ended, and twice the standard deviation that 200 held-out problems leave.
"""

from __future__ import annotations

import sys

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
from stage_report import NO_CUDA, Stage

QUICKSTART = ROOT / "examples" / "quickstart"
BEGAN, ENDED = (0.125, 0.185), (0.63, 0.825)  # smallest and largest of the three seeds
PROBLEMS, STEPS = 200, 25
FEW = ("--train", "64", "--test", "8", "--sft", "128")


def learning(stage: Stage) -> None:
    """Data, fine-tuning, PRIME; one rank."""
    folder = stage.scratch / "quickstart"
    make_quickstart(folder / "data", *(FEW if stage.small else ()))
    start, prime = folder / "sft" / "hf", folder / "prime"
    # Plain layers: the job is in fp32, which Transformer Engine's fused attention does not have.
    common = [
        f"--data.train={folder / 'data' / 'train.jsonl'}",
        "--megatron.transformer_impl=local",
    ]
    sft = [f"--run.folder={folder / 'sft'}", f"--model.hf={folder / 'data' / 'model'}", *common]
    sft += [f"--sft.data={folder / 'data' / 'sft.jsonl'}", f"--sft.output={start}"]
    train = [f"--run.folder={prime}", f"--model.hf={start}", *common, *ONE_RANK]
    train += [f"--data.eval={folder / 'data' / 'test.jsonl'}"]
    if stage.short:
        train += ["--evaluate.every=0"]  # before the first and after the last step
    if stage.small:
        sft += ["--sft.steps=3", "--sft.warmup_steps=0"]
        train += ["--run.steps=1", *EVERY_PROMPT, *FEW_PROMPTS]
    limit = None if stage.small else max(10.0, stage.left())
    log = stage.folder / "learning_jobs.log"
    run(command("sft", QUICKSTART / "sft.toml", *sft), log=log, limit_s=limit)
    run(command("train", QUICKSTART / "prime.toml", *train), log=log, limit_s=limit)
    found = metrics(prime)
    curve = {step: row["evaluate/accuracy"] for step, row in found.items() if "evaluate/accuracy" in row}  # fmt: skip # noqa: E501
    steps = 1 if stage.small else STEPS
    stage.check("steps of PRIME", max(found), str(steps), max(found) == steps)
    judge(stage, curve)


def judge(stage: Stage, curve: dict[int, float]) -> None:
    """Held-out accuracy at the start and at the end."""
    if stage.small or not stage.on_gpu:
        why = "a few steps say nothing" if stage.small else NO_CUDA
        stage.skip("held-out accuracy of the quickstart", f"{BEGAN} → {ENDED}", why)
        return
    shown = ", ".join(f"{step}: {value:.1%}" for step, value in sorted(curve.items()))
    stage.measured("held-out accuracy by step", shown)
    first, last = curve[min(curve)], curve[max(curve)]
    low = BEGAN[0] - 2 * noise(BEGAN[0])
    stage.at_most("it begins where CPUs begin", first, BEGAN[1] + 2 * noise(BEGAN[1]), "%")
    stage.at_least("it begins where CPUs begin, at least", first, low, "%")
    stage.at_least("it ends where CPUs end", last, ENDED[0] - 2 * noise(ENDED[0]), "%")


def noise(accuracy: float) -> float:
    """Standard deviation of a share of so many problems."""
    return (accuracy * (1 - accuracy) / PROBLEMS) ** 0.5


def main(arguments: list[str] | None = None) -> int:
    """All checks of the stage."""
    stage = Stage.of_arguments("learning", arguments)
    stage.part("the quickstart's job", 60, learning)
    return stage.finish()


if __name__ == "__main__":
    sys.exit(main())
