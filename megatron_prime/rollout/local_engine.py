"""The embedded rollout engine: a `transformers` model in the trainer's own process.

Every rank holds a whole copy and answers the prompts of its share. The model is built from
config.json alone; its weights come through `load_weights`, resharded from the policy, never from
the checkpoint's files. So what samples is what trains, and a rollout says which version it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prime.config import ConfigError
from megatron_prime.protocols import Tally, WeightSource
from megatron_prime.rollout.decoding import Request, decode
from megatron_prime.runtime.memory import Buffer, Remade, Storages
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Group, Metrics, Prompt, Rollout, Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    eos_token_id: int | None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of the tokens."""


class LocalEngine:
    """Samples this rank's share of the prompts with the policy's weights."""

    version = -1

    def __init__(
        self,
        hf_dir: Path,
        rank: int,
        world_size: int,
        dtype: Literal["fp32", "bf16", "fp16"],
        batch_size: int,
        tokenizer: Tokenizer,
        device: torch.device | str,
        timeline: Timeline | None = None,
    ) -> None:
        """Build the model that `hf_dir`/config.json describes, without weights worth the name.

        `batch_size` sequences are decoded at once. Raises ConfigError if nothing says which token
        ends a response.
        """
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.tokenizer, self.timeline = tokenizer, timeline or Timeline()
        self.eos_ids = end_of_sequence_ids(tokenizer, hf_dir)
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(hf_dir),
                dtype=DTYPES[dtype],
                attn_implementation="sdpa",
            )
        self.model.eval().requires_grad_(False)

    def load_weights(self, weights: WeightSource, version: int) -> None:
        """Copy whole tensors under their Hugging Face names into the live model.

        A tied output layer may come under its own name or not at all. Until the last tensor has
        arrived the engine has no version and samples nothing. Raises ValueError on a surplus,
        missing, contradicting or differently shaped tensor.
        """
        self.version = -1
        owners = {id(tensor): name for name, tensor in self.model.named_parameters()}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        loaded: set[str] = set()
        for name, tensor in weights.whole():
            if name not in parameters:
                raise ValueError(
                    f"load_weights: the rollout model has no parameter {name}; the policy's names "
                    "must be those of model.hf's architecture"
                )
            parameter = parameters[name]
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"load_weights: {name} has shape {list(tensor.shape)}, wanted "
                    f"{list(parameter.shape)}; model.hf/config.json must describe the policy"
                )
            value, owner = tensor.to(parameter), owners[id(parameter)]
            if owner in loaded and not torch.equal(parameter, value):
                raise ValueError(
                    f"load_weights: {name} came twice with different values; tied tensors "
                    "(tie_word_embeddings) must be equal"
                )
            parameter.copy_(value)
            loaded.add(owner)
        if missing := sorted(set(owners.values()) - loaded):
            raise ValueError(
                f"load_weights: {len(missing)} of {len(owners)} parameters did not arrive: "
                f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; the export of the "
                "policy must yield every tensor of model.hf's architecture"
            )
        self.version = version

    def buffers(self, planned: Mapping[str, int]) -> list[Buffer]:
        """The weights; they come with the next `load_weights`, so that they may be forgotten."""
        weights = Storages(Remade, self.model.parameters)
        return [Buffer("engine.weights", weights, left=self._forget)]

    def _forget(self) -> None:
        self.version = -1

    def take_metrics(self) -> Metrics:
        """None: nothing happens here that a run would have to be told."""
        return {}

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, enough: Tally | None = None
    ) -> Iterator[Group]:
        """Groups for prompts[rank::world_size], each as soon as its last response is decoded.

        No batch begins any more once `enough` is reached. Raises RuntimeError without loaded
        weights, ValueError for a prompt without tokens; both at once, not at the first group.
        """
        if self.version < 0:
            raise RuntimeError(
                "generate: the rollout model has no complete weights; call load_weights first"
            )
        share = prompts[self.rank :: self.world_size]
        for prompt in share:
            if not prompt.token_ids:
                raise ValueError(f"generate: prompt {prompt.prompt_id} has no tokens to continue")
        return self._groups(share, sampling, enough)

    def _groups(
        self, share: Sequence[Prompt], sampling: Sampling, enough: Tally | None
    ) -> Iterator[Group]:
        count = sampling.samples
        requests = [Request(prompt, sample) for prompt in share for sample in range(count)]
        whole_groups = self.batch_size // count * count
        size = whole_groups or self.batch_size  # a group larger than a batch spans several
        waiting: list[Rollout] = []
        prompts = iter(share)
        self.timeline.generating(slots=min(size, len(requests)))
        for start in range(0, len(requests), size):
            if enough is not None and enough.reached():
                break
            batch = requests[start : start + size]
            self.timeline.at_work(len(batch))
            waiting += self._rollouts(batch, sampling)
            if start + size >= len(requests):
                self.timeline.generated()
            while len(waiting) >= count:
                yield Group(next(prompts), tuple(waiting[:count]))
                del waiting[:count]
        self.timeline.generated()

    def _rollouts(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        at_work = self.timeline.at_work
        return [
            Rollout(
                response_ids=response.token_ids,
                rollout_logprobs=response.logprobs,
                finish_reason="stop" if response.stopped else "length",
                policy_version=self.version,
                text=self.tokenizer.decode(response.token_ids, skip_special_tokens=True),
            )
            for response in decode(self.model, requests, sampling, self.eos_ids, at_work)
        ]


def end_of_sequence_ids(tokenizer: Tokenizer, hf_dir: Path) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's, and those of the model's configurations.

    SGLang ends at any of them, so every engine does.
    """
    found = {tokenizer.eos_token_id} - {None}
    for path in (hf_dir / "config.json", hf_dir / "generation_config.json"):
        if path.exists():
            more = json.loads(path.read_text()).get("eos_token_id")
            found |= set(more) if isinstance(more, list) else {more} - {None}
    if not found:
        raise ConfigError(
            f"{hf_dir}: neither the tokenizer nor config.json or generation_config.json names an "
            "end-of-sequence token, so no response would ever stop; set eos_token in "
            "tokenizer_config.json"
        )
    return tuple(sorted(token for token in found if token is not None))
