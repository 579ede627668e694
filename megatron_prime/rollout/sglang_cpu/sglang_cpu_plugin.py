"""Lets each request have its own random numbers (`sampling_seed`) in a server on a CPU.

SGLang offers that under `enable_deterministic_inference`, with attention, matrix products and a
hash of (seed, position, token) that are written in Triton, for GPUs. Here its own plugin framework
puts torch in their place, in every process of the server: `torch_native` attention counts as
deterministic, with the prefix cache left on; torch's operators on a CPU stay as they are, so that
log-probs may differ in the last bits with what else is in a batch; and sampling draws from a
counter: the noise of a token is a hash of (seed, position, token) and of nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_WORD = (1 << 32) - 1
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads neighbouring counters over all bits


def install() -> None:
    """What SGLang calls in each of its processes (entry point group `sglang.srt.plugins`)."""
    from sglang.srt import server_args
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant = "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode"
    HookRegistry.register(batch_invariant, leave_operators, HookType.REPLACE)
    sampler = "sglang.srt.layers.sampler.multinomial_with_seed"
    HookRegistry.register(sampler, multinomial_with_seed, HookType.REPLACE)


def leave_operators(*_args: Any, **_kwargs: Any) -> None:
    """Keep torch's operators: their replacements need Triton."""


def multinomial_with_seed(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    """A token for each row of `logprobs` [B, V] by the Gumbel trick, int64 [B, 1].

    `seed` and `positions`, int64 [B], are all that a row's noise comes from. argmax(log p + Gumbel)
    is argmin(exponential / p); in float64 no exponential is 0.
    """
    uniform_BV = (hashed(seed, positions, logprobs.shape[1]).double() + 0.5) / (_WORD + 1)
    gumbel_BV = uniform_BV.log_().neg_().log_().neg_()
    return gumbel_BV.add_(logprobs).argmax(-1, keepdim=True)


def hashed(seed: Tensor, positions: Tensor, count: int) -> Tensor:
    """`count` evenly distributed numbers below 2^32 for each (seed, position), int64 [B, count]."""
    stream_B = mixed(mixed(seed & _WORD) ^ ((seed >> 32) & _WORD))
    stream_B = mixed(stream_B ^ mixed((positions + _GOLDEN) & _WORD))
    counter_V = torch.arange(count, device=seed.device) * _GOLDEN & _WORD
    # Twice, with the stream in both: two streams are not the same numbers in another order.
    return mixed(mixed(stream_B[:, None] ^ counter_V) + stream_B[:, None] & _WORD)


def mixed(words: Tensor) -> Tensor:
    """A bijection of 32-bit words in int64 where each bit depends on all (hash-prospector's best).

    Both factors are below 2^31, so that no product reaches bit 63.
    """
    words = words ^ (words >> 16)
    words = words * 0x21F0AAAD & _WORD
    words = words ^ (words >> 15)
    words = words * 0x735A2D97 & _WORD
    return words ^ (words >> 15)
