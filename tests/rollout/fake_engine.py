"""An SglangEngine on a fake server, with a small model's weights and what must come of them."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import fake_sglang
import psutil
import torch
import torch.distributed as dist
from given import Given

from megatron_prime.config import ParallelSizes, RolloutSection
from megatron_prime.rollout.engine_group import EngineGroup, Membership
from megatron_prime.rollout.generation import sampling_seed
from megatron_prime.rollout.sglang_engine import SglangEngine
from megatron_prime.rollout.weight_sync import LOADER, WeightSync
from megatron_prime.types import Prompt, Sampling
from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.placement import EngineLayout, TrainingLayout
from megatron_prime.weights.plan import make_plan
from megatron_prime.weights.reshard import Reshard
from megatron_prime.weights.shape import ModelShape

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from engine_truth import sglang_parameters

STOP = 9
SAMPLING = Sampling(samples=3, temperature=1.0, max_tokens=12, seed=5)
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
PROMPTS = [
    Prompt(100 + n, tuple(4 + (n + i) % 60 for i in range(1 + 5 * n)), "0", "math", "test")
    for n in range(9)
]


class Numbers:
    """A tokenizer whose text shows the tokens."""

    eos_token_id = STOP

    def decode(self, token_ids, *, skip_special_tokens):
        return " ".join(str(token) for token in token_ids if token != STOP)


class Setting:
    """What an engine needs, one per test; `engine` starts this rank's server."""

    def __init__(self, folder: Path, tp: int = 1, **knobs: Any) -> None:
        """`folder` is the same on all ranks."""
        self.folder, self.tp = folder, tp
        (folder / "model").mkdir(parents=True, exist_ok=True)
        mine = folder / "model" / f"config.{os.getpid()}"
        mine.write_text(json.dumps(CONFIG))
        mine.rename(folder / "model" / "config.json")  # whole, whoever else writes or reads it
        self.shape = ModelShape.from_hf(folder / "model", 1)
        self.knobs = RolloutSection(
            engine="sglang",
            tensor_parallel_size=tp,
            **{"request_timeout_s": 60.0, "hang_timeout_s": 3.0, "sync_timeout_s": 20.0} | knobs,
        )

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Random ones, under their Hugging Face names."""
        numbers = torch.Generator().manual_seed(seed)
        return {n: torch.randn(s, generator=numbers) for n, s in hf_shapes(self.shape).items()}

    def digest(self, seed: int) -> str:
        """Of what the server's ranks must hold of them."""
        hf = self.weights(seed)
        ranks = [sglang_parameters(hf, self.shape, self.tp, rank) for rank in range(self.tp)]
        return fake_sglang.digest_of(ranks)

    def server_folder(self, server: int) -> Path:
        return self.folder / str(server)

    def engine(self, store: dist.Store, **faults: Any) -> SglangEngine:
        """Of this rank."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        member = Membership(rank, world_size, self.tp)
        hf = self.weights(0)
        tables = [
            {
                name: list(p.shape)
                for name, p in sglang_parameters(hf, self.shape, self.tp, i).items()
            }
            for i in range(self.tp)
        ]
        folder = self.server_folder(member.server)
        folder = folder if member.leads else folder / str(rank)  # nothing is started there
        spec = fake_sglang.spec(folder, {"parameters": tables}, self.tp, **faults)
        group = dist.new_group(backend="gloo")
        plan = make_plan(
            self.shape,
            TrainingLayout(ParallelSizes(), world_size),
            EngineLayout(self.tp, world_size),
            4,
            4000,
            world_size,
        )
        assert len(plan.rounds) > 3
        reshard = Reshard(plan, rank, torch.float32)
        return SglangEngine(
            EngineGroup(
                member,
                dataclasses.replace(spec, weight_loader=LOADER, start_timeout_s=120),
                None,
                group,
            ),
            WeightSync(reshard, torch.device("cpu"), self.knobs.sync_timeout_s),
            self.knobs,
            Numbers(),
            (STOP,),
            store,
        )

    def load(self, engine: SglangEngine, version: int, seed: int | None = None) -> None:
        """The weights of a seed, by default that of the version's number."""
        source = Given(list(self.weights(version if seed is None else seed).items()))
        engine.load_weights(source, version)


def truth(
    digest: str, prompt: Prompt, sample: int, sampling: Sampling = SAMPLING, begun: tuple = ()
) -> tuple[int, ...]:
    """The tokens of a response; `begun`: what other weights have sampled of it."""
    seed = sampling_seed(sampling.seed, prompt.prompt_id, sample)
    found = list(begun)
    while len(found) < sampling.max_tokens and STOP not in found:
        asked = "greedy" if sampling.temperature == 0 else seed
        found.append(fake_sglang.next_token(asked, [*prompt.token_ids, *found], digest))
    return tuple(found)


def check_groups(groups: list, digest: str, version: int, prompts=PROMPTS) -> None:
    """One group per prompt, with the tokens, log-probs, texts and versions that it must have."""
    assert sorted(g.prompt.prompt_id for g in groups) == [p.prompt_id for p in prompts]
    for group in groups:
        assert len(group.rollouts) == SAMPLING.samples
        for k, rollout in enumerate(group.rollouts):
            wanted = truth(digest, group.prompt, k)
            assert rollout.response_ids == wanted
            assert rollout.rollout_logprobs == tuple(-0.25 * (1 + t % 7) for t in wanted)
            assert rollout.text == Numbers().decode(wanted, skip_special_tokens=True)
            assert rollout.finish_reason == ("stop" if wanted[-1] == STOP else "length")
            assert (rollout.policy_version, rollout.older_spans) == (version, ())


def asked(folder: Path) -> dict[int, int]:
    """How often the server of this folder was asked for the samples of each prompt."""
    found: dict[int, int] = {}
    for line in fake_sglang.asked(folder):
        if line["rid"].endswith("-0;"):
            prompt_id = int(line["rid"].split("-")[2])
            found[prompt_id] = found.get(prompt_id, 0) + 1
    return found


def children() -> set[psutil.Process]:
    """Of this process, all that still run; among them may be other tests' servers and daemons."""
    family = psutil.Process().children(recursive=True)
    return {child for child in family if child.status() != psutil.STATUS_ZOMBIE}
