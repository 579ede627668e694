"""Choosing the next token, with random numbers that belong to the response alone.

Response k of prompt p draws token t with the t-th uniform of a stream seeded by (seed, p, k). So
a rollout does not depend on which others shared its batch, nor on the number of ranks. A uniform u
picks the token by inverting the cumulative distribution of softmax(logits / temperature).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, prompt_id: int, sample: int, count: int) -> Tensor:
    """The first `count` random numbers of one response, float64 [count] in [0, 1)."""
    stream = np.random.SeedSequence(seed, spawn_key=(prompt_id, sample))
    return torch.from_numpy(np.random.Generator(np.random.Philox(stream)).random(count))


def choose_tokens(
    logits_BV: Tensor, temperature: float, uniforms_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The next token of each row, int64 [B], and its log-prob, float32 [B].

    The log-prob is log_softmax(logits / temperature)[token] in fp32. Temperature 0 takes the most
    likely token and its log-prob at temperature 1. No token of probability 0 is ever taken. Where
    logits are NaN, so is the log-prob.
    """
    logprobs_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens_B1 = logprobs_BV.argmax(-1, keepdim=True)
    else:
        cumulative_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
        total_B1 = cumulative_BV[:, -1:].contiguous()  # 1 up to rounding
        # The first token whose cumulative probability exceeds u has a probability above 0; where
        # rounding lets u * total reach the total, the last such token is the one that reaches it.
        found_B1 = torch.searchsorted(cumulative_BV, uniforms_B[:, None] * total_B1, right=True)
        last_B1 = torch.searchsorted(cumulative_BV, total_B1).clamp(max=logits_BV.shape[1] - 1)
        tokens_B1 = torch.minimum(found_B1, last_B1)
    return tokens_B1[:, 0], logprobs_BV.gather(-1, tokens_B1)[:, 0]
