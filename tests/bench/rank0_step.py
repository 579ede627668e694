"""What rank 0 does itself in a step at the paper's size: 256 prompts × 4 × (1024 + 3072 tokens).

    python tests/bench/rank0_step.py [--repeat 3] [--servers 2 8] [--sampled 512] [--response 3072]

Rollouts are synthetic, but everything that handles them is the real code: prompts and tokenizer,
the client and its checks against a server over loopback, decoding, the verifier's pool, the
gathering of all ranks' groups, the batch, filter, figures, advantages, packs, files. Every response
has the greatest length. Where two prompts are sampled for one that is kept, `--sampled` is twice
256; rank 0 speaks to one of `--servers`, so it decodes and verifies that share of them, and all
else is of all of them. Seconds are those of this process's CPU time, all threads, and beside it the
time by the clock; what a stage's own servers and workers take is not in the first. Each stage is
repeated; the least counts, for the machine may do other work.

Prints Markdown tables, and compares with the step that the planner predicts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measure import resident

from megatron_prime.runtime.compat import before_megatron_import, install_cpu_shim

before_megatron_import()

from megatron_prime import figures  # noqa: E402
from megatron_prime.algorithm.advantage import prime_advantages  # noqa: E402
from megatron_prime.algorithm.filtering import passes  # noqa: E402
from megatron_prime.config import RunConfig  # noqa: E402
from megatron_prime.data.prompts import PromptStream, load_prompts  # noqa: E402
from megatron_prime.models.micro_batch import Grid, cut  # noqa: E402
from megatron_prime.rollout.generation import Limits, PassRunner  # noqa: E402
from megatron_prime.rollout.sglang_client import SglangClient  # noqa: E402
from megatron_prime.runtime.distributed import WorldRanks  # noqa: E402
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

PROMPTS, GROUP, PROMPT = 256, 4, 1024
WORKERS = 4  # as in the examples
END = r" so the answer is \boxed{42}"


@dataclass
class Stages:
    """Seconds of each stage: of the process, and by the clock; the least of all repeats."""

    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, repeat: int, work: Callable[[], Any]) -> Any:
        """Do it; the last result."""
        found, cpu, wall = None, [], []
        for _ in range(repeat):
            found = None
            began, clock = time.process_time(), time.perf_counter()
            found = work()
            cpu.append(time.process_time() - began)
            wall.append(time.perf_counter() - clock)
        self.cpu[name], self.wall[name] = min(cpu), min(wall)
        return found


def make_tokenizer() -> tuple[Any, str]:
    """A byte-level BPE of this machine's own Python sources, and their text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:120]
    text = "\n".join(source.read_text(errors="ignore") for source in sources)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(), 16000, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer, text


def prompt_rows(path: Path, text: str, count: int) -> None:
    """Math rows whose prompts come near 1024 tokens."""
    generator = random.Random(2)
    with path.open("w") as file:
        for _ in range(count):
            start = generator.randrange(len(text) - 3000)
            row = {
                "data_source": "synthetic",
                "prompt": [{"role": "user", "content": text[start : start + 2500]}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "42"},
            }
            file.write(json.dumps(row) + "\n")


@contextmanager
def server(tokens: Path, response: int) -> Iterator[str]:
    """Its address."""
    program = [sys.executable, str(Path(__file__).with_name("rank0_server.py"))]
    process = subprocess.Popen([*program, tokens, str(response)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def generate(
    url: str, prompts: list[Prompt], tokenizer: Any, response: int, text: bool
) -> list[Group]:
    """As the leader of one server does it; `text`: decoded, too."""

    def decode(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True) if text else ""

    async def run() -> list[Group]:
        async with SglangClient(url, "key") as client:
            limits = Limits(64, 600.0, 600.0, False)
            runner = PassRunner(client, lambda: True, limits, [0], 0, "0-1", decode, Timeline())
            groups: list[Group] = []
            numbers = itertools.count()
            sampling = Sampling(GROUP, 1.0, response, 1)
            take = lambda: next(numbers)  # noqa: E731
            found = await runner.run(prompts, sampling, {}, take, groups.append, None)
            assert found.problem is None, found.problem
            return groups

    return asyncio.run(run())


def training_work(
    stages: Stages, repeat: int, groups: list[VerifiedGroup], replicas: int, folder: Path
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
    grid = Grid(0, replicas, 0, 1, 2, 1, 8, torch.device("cpu"))
    mini = len(batch.sequences) // 4

    def packs() -> None:  # of the reference, old log-probs, PRM and policy
        everything = range(len(batch.sequences))
        cut(batch.sequences, everything, 4096, grid)
        cut(batch.sequences, everything[mini:], 4096, grid)
        for first in range(0, len(everything), mini):
            for _ in ("PRM", "policy"):
                cut(batch.sequences, everything[first : first + mini], 4096, grid)

    measure("packs", repeat, packs)
    metrics = figures.of_batch(trained, update, config)
    with RunRecorder(folder / "run", 10, 0, save_rollouts=True) as recorder:
        steps = itertools.count(1)
        measure("metrics", repeat, lambda: recorder.log(next(steps), metrics))
        measure("rollout files (if asked for)", repeat, lambda: recorder.rollouts(1, groups))


def of_models(scored: Any, trained: TrainBatch, update: PolicyUpdate, config: RunConfig) -> None:
    figures.of_prm(scored, scored.ref_logprobs, None)
    figures.of_batch(trained, update, config)


def step(servers: int, sampled: int, response: int, repeat: int, folder: Path) -> Stages:
    """All stages, and the memory that they leave taken."""
    stages = Stages()
    measure = stages.measure
    tokenizer, text = make_tokenizer()
    ids = tokenizer.encode(text)
    end = tokenizer.encode(END)
    prompt_rows(folder / "train.jsonl", text, sampled)
    (folder / "tokens.json").write_text(json.dumps(ids))
    load = lambda: load_prompts(folder / "train.jsonl", tokenizer, "none", 10_000)  # noqa: E731
    loaded = measure("(once: tokenizing the prompts)", 1, load)
    prompts = [replace(one, token_ids=one.token_ids[:PROMPT]) for one in loaded.prompts]
    stream = PromptStream(prompts, 1)
    measure("prompts", repeat, lambda: PromptStream(prompts, 1) and stream.take(1))
    mine = prompts[: sampled // servers]
    with server(folder / "tokens.json", response) as url:
        ask = lambda text: generate(url, mine, tokenizer, response, text)  # noqa: E731
        measure("HTTP, JSON, checks", repeat, lambda: ask(False))
        began = resident("VmRSS")
        answered = ask(True)
    stages.wall["bytes of its own rollouts"] = resident("VmRSS") - began
    decode = lambda: [  # noqa: E731
        tokenizer.decode(one.response_ids, skip_special_tokens=True)
        for group in answered
        for one in group.rollouts
    ]
    measure("decoding", repeat, decode)
    ended = [with_end(group, END, tuple(end)) for group in answered]
    with VerifierPool(WORKERS, 30.0) as pool:
        pool.verify(ended[:4])
        verified = measure("verifying (dispatch)", repeat, lambda: pool.verify(ended))
    assert all(group.outcome_rewards == (1.0,) * GROUP for group in verified)
    pickled = pickle.dumps(verified)  # every server's are objects of their own
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
    training_work(stages, repeat, gathered[:PROMPTS], 4 if servers > 2 else 2, folder)
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
    parser.add_argument("--servers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--sampled", type=int, default=512)
    parser.add_argument("--response", type=int, default=3072)
    asked = parser.parse_args()
    import torch.distributed as dist

    install_cpu_shim()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {}
    for servers in asked.servers:
        with tempfile.TemporaryDirectory() as folder:
            found[servers] = step(
                servers, asked.sampled, asked.response, asked.repeat, Path(folder)
            )
    names = list(next(iter(found.values())).cpu)
    print("| | " + " | ".join(f"1 of {n} servers: CPU s | clock s" for n in found) + " |")
    print("|---" * (1 + 2 * len(found)) + "|")
    for name in names:
        cells = " | ".join(f"{one.cpu[name]:.3f} | {one.wall[name]:.3f}" for one in found.values())
        print(f"| {name} | {cells} |")
    once = [n for n in names if not n.startswith("(") and "asked" not in n]
    totals = " | ".join(
        f"{sum(one.cpu[n] for n in once):.2f} | {sum(one.wall[n] for n in once):.2f}"
        for one in found.values()
    )
    print(f"| together, per step | {totals} |")
    print(f"resident at the peak: {resident('VmHWM') / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
