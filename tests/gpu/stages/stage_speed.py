"""Stage 5, speed: how much of the chip an update and a scoring pass use; generation against plain
SGLang; where the time of a whole step goes, and what PRIME costs beside outcome-only RLOO.

Model FLOPs are counted by planner/flops.py: three forwards for an update, what is computed anew
does not count. The peak is the data sheet's. Plain SGLang is the same server with dummy weights and
no trainer beside it, asked once for everything.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import aiohttp
import torch
from rloo_step import HERE as BENCH
from rloo_step import phases
from stage_colocated import colocated
from stage_measure import GIB, seconds_of
from stage_report import NO_CUDA, Stage, put_away
from stage_sizes import (
    MODELS,
    chip_rates,
    config_of,
    dtype_of,
    model_folder,
    prompts,
    sglang_missing,
    sglang_options,
    sglang_python,
    shapes_of,
)
from stage_update import FUSED, Figures, config_for, figures
from turns import Contestant, take_turns

from megatron_prime.config import RunConfig
from megatron_prime.data.chat import load_tokenizer
from megatron_prime.protocols import Phase
from megatron_prime.rollout.sglang_arguments import ServerSpec
from megatron_prime.rollout.sglang_server import SglangServer

GOAL_MFU = 0.45
GOAL_ROLLOUT = 0.97
GOAL_PRIME = 1.15  # of an outcome-only step (tests/bench/prime_step.py)
KEY = "the-key-of-the-run"


def utilisation(stage: Stage, name: str, layers: int) -> None:
    """Update and scoring, with Megatron's defaults and with what it can fuse (not in a hurry)."""
    found: dict[str, Figures] = {}
    hows = {"Megatron's defaults": {}, "fused kernels": FUSED}
    for how, megatron in list(hows.items())[: 2 if stage.on_gpu and not stage.short else 1]:
        label = f"{name}, {layers} layers, {how}"
        config = config_for(stage, name, layers, {}, dict(megatron))
        stage.attempt(label, one_way, stage, label, config, found)
    if stage.on_gpu and chip_rates() is None:
        stage.skip(f"{name}: MFU", f"≥ {GOAL_MFU:.0%}", "planner/rates.py lacks this chip")
        return
    for what in ("update", "scoring"):
        best = max((getattr(one, f"{what}_mfu") for one in found.values()), default=0.0)
        stage.on_cuda(f"{name}, {layers} layers: best MFU, {what}", best, "%", GOAL_MFU)


def one_way(stage: Stage, label: str, config: RunConfig, kept: dict[str, Figures]) -> None:
    """The figures of one configuration, into `kept`."""
    found = kept[label] = figures(stage, config)
    put_away()
    stage.on_cuda(f"{label}: update, {found.tokens} tokens", found.update_s, "s")
    stage.on_cuda(f"{label}: scoring", found.scoring_s, "s")
    stage.on_cuda(f"{label}: peak of the update", found.update_peak / GIB, "GiB")
    stage.on_cuda(f"{label}: MFU of the update", found.update_mfu, "%")
    stage.on_cuda(f"{label}: MFU of scoring", found.scoring_mfu, "%")


def product(stage: Stage) -> None:
    """What one large bf16 matrix product reaches here: the ceiling of any MFU."""
    side = 256 if stage.small else 8192
    dtype = torch.bfloat16
    device = "cuda" if stage.on_gpu else "cpu"
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, warm_up=3, repeat=10)
    stage.on_cuda(f"a bf16 product of {side}³", 2 * side**3 / seconds / 1e12, "TFLOP/s")


# ---------------------------------------------------------------------- generation


def rollout_config(stage: Stage, model: Path) -> RunConfig:
    """As many sequences as keep a small model busy."""
    count, tokens = (4, 16) if stage.small else (64, 512)
    return config_of(
        stage,
        model,
        "rollout",
        rollout={"prompts_per_step": count, "max_response_length": tokens},
        advantage={"process_weight": 1.0},
        policy={"mini_batch_size": 4 * count},
        prm={"mini_batch_size": 4 * count},
        memory={"offload": "always"},
        sglang={**sglang_options(), "max_total_tokens": 4 * count * (tokens + 64)},
    )


def rollout(stage: Stage) -> None:
    """Ours, then a plain server; each once to warm up, then the better of two."""
    model = model_folder(stage, *(("tiny", 2) if stage.small else ("1.5B", 28)))
    config = rollout_config(stage, model)
    mine = our_rates(config)
    put_away()  # the models are gone, and so must be their memory
    theirs = plain_rates(stage, config)
    ours, plain = max(mine[1:]), max(theirs[1:])
    stage.on_cuda("generation", ours, "tokens/s")
    stage.on_cuda("generation by plain SGLang", plain, "tokens/s")
    stage.on_cuda("generation, of plain SGLang's", ours / plain, "%", GOAL_ROLLOUT)


def our_rates(config: RunConfig) -> list[float]:
    """Tokens per second of three rounds; a sync follows each, as in a run."""
    count, rates = config.rollout.prompts_per_step, []
    with colocated(config) as run:
        run.sync()
        for _ in range(3):
            groups = run.generate(count)
            tokens = sum(len(r.response_ids) for group in groups for r in group.rollouts)
            rates.append(tokens / run.watched["generate"].seconds)
            with run.phase(Phase.UPDATE_POLICY):
                pass
            run.sync()
    return rates


def plain_rates(stage: Stage, config: RunConfig) -> list[float]:
    """Tokens per second of a server by itself, three rounds."""
    spec = ServerSpec(
        python=sglang_python(),
        model_dir=config.model.hf,
        tp=1,
        devices=("0",) if stage.on_gpu else None,
        host="127.0.0.1",
        api_key=KEY,
        dtype=config.precision.policy.dtype,
        folder=stage.scratch / "plain",
        options=config.sglang,
    )
    server = SglangServer(spec)
    try:
        server.start()
        server.ready()
        given = prompts(load_tokenizer(config.model.hf), config.rollout.prompts_per_step)
        ids = [list(prompt.token_ids) for prompt in given]
        return [asyncio.run(ask(server.url, ids * 4, config)) for _ in range(3)]
    finally:
        server.kill()


async def ask(url: str, ids: list[list[int]], config: RunConfig) -> float:
    """One request for all samples, as a script would send it; tokens per second."""
    limit = config.rollout.max_response_length
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": limit, "ignore_eos": True},
        "return_logprob": True,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        started = time.perf_counter()
        async with session.post(f"{url}/generate", json=body) as answer:
            answer.raise_for_status()
            found = await answer.json()
        seconds = time.perf_counter() - started
    return sum(one["meta_info"]["completion_tokens"] for one in found) / seconds


# ---------------------------------------------------------------------- a whole step


def whole_step(stage: Stage) -> None:
    """The real command, PRIME and then outcome-only RLOO, one after the other on the device."""
    found = {kind: contestant(stage, kind) for kind in ("prime", "rloo")}
    for kind, side in found.items():
        stage.on_cuda(f"a whole step, {kind}", side.median, "s")
        if stage.on_gpu:
            stage.measured(f"its phases, {kind}", phases(side))
        else:
            stage.skip(f"its phases, {kind}", "", NO_CUDA)
    ratio = found["prime"].median / found["rloo"].median
    stage.on_cuda("a PRIME step, of an outcome-only one", ratio, "×", most=GOAL_PRIME)


def contestant(stage: Stage, kind: str) -> Contestant:
    """Some steps of `train`; its figures stay when it is gone."""
    model = model_folder(stage, *(("tiny", 2) if stage.small else ("1.5B", 28)))
    folder = stage.scratch / "task"
    folder.mkdir(exist_ok=True)
    if not (folder / "model").exists():
        (folder / "model").symlink_to(model)
        write_task(folder)
    knobs = [f"--precision.{one}.dtype={dtype_of(stage)}" for one in MODELS]
    if stage.small:
        knobs += ["--rollout.max_response_length=8", "--rollout.prompts_per_step=4"]
        knobs += ["--policy.mini_batch_size=16", "--prm.mini_batch_size=16"]
    else:
        knobs += ["--rollout.max_response_length=512", "--policy.micro_batch_tokens=16384"]
        knobs += ["--prm.micro_batch_tokens=16384", "--rollout.engine=sglang"]
        knobs += [f"--rollout.sglang_python={sglang_python()}", "--run.steps=20"]
        knobs += [f"--sglang.{key}={value}" for key, value in sglang_options().items()]
    side = Contestant("1 × 1", BENCH / "rloo_ours.py", [folder, kind, *knobs], 1, 4)
    with side:
        take_turns([side], 1, 2)
    return side


def write_task(folder: Path) -> None:
    """Prompts with rewards that nobody earns; every prompt trains."""
    import random

    from make_data import write_rows
    from model import prompt_row

    rng = random.Random(0)
    write_rows(folder / "train.jsonl", [prompt_row(rng) for _ in range(512)])


def main(arguments: list[str] | None = None) -> int:
    """All checks of the stage."""
    stage = Stage.of_arguments("speed", arguments)
    stage.part("a matrix product", 3, product)
    for name, layers in shapes_of(stage):
        stage.part(f"{name}, {layers} layers: MFU", 25, utilisation, name, layers)
    why = sglang_missing()
    for name, needs, work in (("generation", 50, rollout), ("a whole step", 50, whole_step)):
        if why:
            stage.skip(name, "", why)
        else:
            stage.part(name, needs, work)
    return stage.finish()


if __name__ == "__main__":
    sys.exit(main())
