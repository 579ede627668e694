"""One rank of megatron_prime in this process, and rows of ragged lengths to work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_prime.config import RunConfig
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.rendezvous import Rendezvous
from megatron_prime.types import RolloutBatch, TokenSequence

ROWS, GROUP = 128, 4
MEDIAN, SPREAD, LONGEST = 96, 0.6, 448  # response tokens, log-normal
PROMPT = (16, 64)  # prompt tokens, even
MICRO_BATCH_TOKENS = 8192  # the default


def run_config(folder: Path, model: Path) -> RunConfig:
    """fp32, one optimizer step per update."""
    batch = {
        "lr": 1e-4,
        "mini_batch_size": ROWS,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
    }
    return RunConfig.model_validate(
        {
            "run": {"folder": folder / "run"},
            "model": {"hf": model},
            "precision": {name: {"dtype": "fp32"} for name in ("policy", "prm", "reference")},
            "data": {"train": folder / "train.jsonl"},
            "policy": batch,
            "advantage": {"process_weight": 0.0},
        }
    )


@contextmanager
def one_rank(config: RunConfig) -> Iterator[None]:
    """Megatron's process groups of a single rank, TP 1 × PP 1."""
    before_megatron_import()
    from megatron_prime import build

    launch = Launch(Rendezvous(), config.run.lost_after_s, config.run.timeout_s, saves=False)
    with build.training_session(config, launch, "train"):
        yield
    launch.finish()


def ragged_rows(vocab_size: int) -> RolloutBatch:
    """Random tokens, the same in every process; not 0, which `transformers` trains as padding."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(*PROMPT, (ROWS,), generator=generator)
    spread = (torch.randn(ROWS, generator=generator) * SPREAD).exp()
    responses = (MEDIAN * spread).long().clamp(1, LONGEST)
    sequences = tuple(
        TokenSequence(
            tuple(torch.randint(1, vocab_size, (p + r,), generator=generator).tolist()), p
        )
        for p, r in zip(prompts.tolist(), responses.tolist(), strict=True)
    )
    mask = torch.arange(int(responses.max())) < responses[:, None]
    rewards = torch.randint(0, 2, (ROWS,), generator=generator).float()
    return RolloutBatch(sequences, GROUP, mask, rewards, torch.zeros(mask.shape))
