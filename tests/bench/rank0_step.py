"""What rank 0 does itself in a step at the paper's size: 256 prompts × 4 × (1024 + 3072 tokens).

    python tests/bench/rank0_step.py [--repeat 3] [--servers 2 8] [--sampled 512] [--response 3072]

Two servers are those of Qwen2.5-Math-7B on 8 GPUs, eight those of Llama-3.1-70B on 64.

Rollouts are synthetic, but everything that handles them is the real code: prompts and tokenizer,
the client and its checks against a server over loopback, decoding, the verifier's pool, the
gathering of all ranks' groups, the batch, filter, figures, advantages, packs, files. Prompts have
1024 tokens, responses `--response` on average: lengths as the planner draws them, at most 3072.
Where two prompts are sampled for one that is kept, `--sampled` is twice 256; rank 0 speaks to one
of `--servers`, so it decodes and verifies that share of them, and all else is of all of them.
Seconds are those of this process's CPU time, all threads, and beside it the time by the clock; the
server's is not in the first, the verifier's workers have a line of their own. Each stage is
repeated; the median counts. Some of it is done while servers generate, in threads beside; for the
rest all GPUs wait.

Prints a Markdown table, and compares with the step that the planner predicts for such lengths.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rank0_given import LONGEST, PROMPT, example, make_tokenizer, prompt_rows, server
from rank0_table import IF_ASKED, ONCE, RUNS, WORKERS, Stages, show

from megatron_prime.runtime.compat import before_megatron_import, install_cpu_shim

before_megatron_import()

from megatron_prime import figures  # noqa: E402
from megatron_prime.algorithm.advantage import prime_advantages  # noqa: E402
from megatron_prime.algorithm.filtering import passes  # noqa: E402
from megatron_prime.config import ParallelSizes, RunConfig  # noqa: E402
from megatron_prime.data.prompts import PromptStream, load_prompts  # noqa: E402
from megatron_prime.models.engine import Engine, Forward  # noqa: E402
from megatron_prime.models.micro_batch import Grid, cut  # noqa: E402
from megatron_prime.rollout.generation import Limits, PassRunner  # noqa: E402
from megatron_prime.rollout.sglang_client import SglangClient  # noqa: E402
from megatron_prime.runtime.distributed import (  # noqa: E402
    WorldRanks,
    initialize_model_parallel,
)
from megatron_prime.runtime.recorder import RunRecorder  # noqa: E402
from megatron_prime.runtime.timeline import Timeline  # noqa: E402
from megatron_prime.types import (  # noqa: E402
    Group,
    OldLogprobs,
    PolicyUpdate,
    Prompt,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
)
from megatron_prime.verify.pool import VerifierPool  # noqa: E402

PROMPTS, GROUP = 256, 4
END = r" so the answer is \boxed{42}"


def generate(url: str, prompts: list[Prompt], tokenizer: Any, text: bool) -> list[Group]:
    """As the leader of one server does it; `text`: decoded, too."""

    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True) if text else ""

    async def run() -> list[Group]:
        async with SglangClient(url, "key") as client:
            limits = Limits(64, 600.0, 600.0, False)
            runner = PassRunner(client, lambda: True, limits, [0], 0, "0-1", decode, Timeline())
            groups: list[Group] = []
            numbers = itertools.count()
            sampling = Sampling(GROUP, 1.0, LONGEST, 1)
            take = lambda: next(numbers)  # noqa: E731
            found = await runner.run(prompts, sampling, {}, take, groups.append, None)
            assert found.problem is None, found.problem
            return groups

    return asyncio.run(run())


def training_work(
    stages: Stages, repeat: int, groups: list[VerifiedGroup], grid: Grid, folder: Path
) -> None:
    """From the kept groups to a step's figures, everything but the models."""
    config = RunConfig.model_validate(
        {"run": {"folder": folder}, "model": {"hf": folder}, "data": {"train": folder}}
    )
    measure = stages.measure
    batch = measure("batch", repeat, lambda: RolloutBatch.from_groups(groups))
    measure("figures of rollouts", repeat, lambda: figures.of_rollouts(groups, groups, 1))
    process = torch.randn(batch.response_mask.shape) * 0.01
    rows = batch.outcome_rewards, batch.response_mask, batch.group_size
    advantages = measure(
        "advantages", repeat, lambda: prime_advantages(process, *rows, config.advantage)
    )
    ref = batch.rollout_logprobs
    scored = ScoredBatch(batch, OldLogprobs.none(batch), ref)
    update = PolicyUpdate(batch.rollout_logprobs + 0.01, {})
    trained = TrainBatch(scored, process, advantages)
    measure("figures of PRM and policy", repeat, lambda: of_models(scored, trained, update, config))
    mini = len(batch.sequences) // 4

    def packs() -> None:  # of the reference, old log-probs, PRM and policy
        everything = range(len(batch.sequences))
        cut(batch.sequences, everything, 4096, grid)
        cut(batch.sequences, everything[mini:], 4096, grid)
        for first in range(0, len(everything), mini):
            for _ in ("PRM", "policy"):
                cut(batch.sequences, everything[first : first + mini], 4096, grid)

    measure("packs", repeat, packs)
    measure("log-probs from the models", repeat, lambda: assemble(batch, grid))
    metrics = figures.of_batch(trained, update, config)
    with RunRecorder(folder / "run", 10, 0, save_rollouts=True) as recorder:
        steps = itertools.count(1)
        measure("metrics", repeat, lambda: recorder.log(next(steps), metrics))
        measure(IF_ASKED, repeat, lambda: recorder.rollouts(1, groups))


def assemble(batch: RolloutBatch, grid: Grid) -> None:
    """Log-probs and entropies on the host: once for the reference, once for old log-probs, and in
    each of two models' four optimizer steps."""
    engine: Any = SimpleNamespace(grid=grid)
    width = batch.response_mask.shape[1]
    packs = torch.arange(len(batch.sequences) // grid.dp_size).split(3)
    outputs = [Forward(rows, *torch.zeros(2, len(rows), width)) for rows in packs]
    for _ in range(10):
        Engine._assemble(engine, outputs, batch.sequences)


def of_models(scored: Any, trained: TrainBatch, update: PolicyUpdate, config: RunConfig) -> None:
    figures.of_prm(config.prm, scored, scored.ref_logprobs, None, 0)
    figures.of_batch(trained, update, config)


def grid_of(name: str, folder: Path) -> Grid:
    """Of rank 0 of an example."""
    config, ranks = example(name, folder)
    sizes = config.parallel
    return Grid(0, ranks // sizes.replica, 0, sizes.cp, sizes.pp, 1, sizes.tp, torch.device("cpu"))


def workers_seconds() -> float:
    """CPU time that this process's children have had so far: the verifier's workers."""
    found = [one.cpu_times() for one in psutil.Process().children()]
    return sum(one.user + one.system for one in found)


def step(servers: int, sampled: int, response: int, repeat: int, folder: Path) -> Stages:
    """All stages."""
    stages = Stages()
    measure = stages.measure
    tokenizer, text = make_tokenizer()
    ids = tokenizer.encode(text)
    end = tokenizer.encode(END)
    prompt_rows(folder / "train.jsonl", text, sampled)
    (folder / "tokens.json").write_text(json.dumps(ids))
    loaded = measure(
        ONCE, 1, lambda: load_prompts(folder / "train.jsonl", tokenizer, "none", 10_000)
    )
    prompts = [replace(one, token_ids=one.token_ids[:PROMPT]) for one in loaded.prompts]
    assert all(len(one.token_ids) == PROMPT for one in prompts)
    stages.load = os.getloadavg()[0]
    stream = PromptStream(prompts, 1)
    measure("prompts", repeat, lambda: stream.take(sampled))
    mine = prompts[: sampled // servers]
    with server(folder / "tokens.json", response) as url:
        ask = lambda text: generate(url, mine, tokenizer, text)  # noqa: E731
        measure("HTTP, JSON, checks", repeat, lambda: ask(False))
        answered = ask(True)
    decode = lambda: [  # noqa: E731
        tokenizer.decode(one.response_ids, skip_special_tokens=True)
        for group in answered
        for one in group.rollouts
    ]
    measure("decoding", repeat, decode)
    ended = [with_end(group, END, tuple(end)) for group in answered]
    with VerifierPool(WORKERS, 30.0) as pool:
        pool.verify(ended[:4])
        before = workers_seconds()
        verified = measure("verifying (dispatch)", repeat, lambda: pool.verify(ended))
        stages.workers = (workers_seconds() - before) / repeat
        stages.checks = len(ended) * GROUP
    assert all(group.outcome_rewards == (1.0,) * GROUP for group in verified)
    lengths = [len(one.response_ids) for group in verified for one in group.rollouts]
    stages.mean_response = sum(lengths) / len(lengths)
    pickled = pickle.dumps(verified)  # every server's are objects of their own
    stages.pickled = len(pickled)
    copies = [
        replace(group, prompt=replace(group.prompt, prompt_id=number * len(mine) + i))
        for number in range(servers)
        for i, group in enumerate(pickle.loads(pickled))
    ]
    asked = [group.prompt for group in copies]
    ranks = WorldRanks(600.0)
    gathered = measure("gathering", repeat, lambda: ranks.gather(copies, asked))
    window = RunConfig.model_validate(
        {"run": {"folder": folder}, "model": {"hf": folder}, "data": {"train": folder}}
    ).filter
    measure("filter", repeat, lambda: [passes(group, window) for group in gathered])
    training_work(stages, repeat, gathered[:PROMPTS], grid_of(RUNS[servers], folder), folder)
    return stages


def with_end(group: Group, end: str, ids: tuple[int, ...]) -> Group:
    """With the answer in every response."""
    rollouts = tuple(
        replace(one, text=one.text + end, response_ids=one.response_ids[: -len(ids)] + ids)
        for one in group.rollouts
    )
    return replace(group, rollouts=rollouts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--servers", type=int, nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--sampled", type=int, default=512)
    parser.add_argument("--response", type=int, default=LONGEST)
    asked = parser.parse_args()
    install_cpu_shim()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelSizes(), 1, 600.0)
    found = {}
    for servers in asked.servers:
        with tempfile.TemporaryDirectory() as folder:
            found[servers] = step(
                servers, asked.sampled, asked.response, asked.repeat, Path(folder)
            )
    show(found, asked.response)


if __name__ == "__main__":
    main()
