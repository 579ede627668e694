"""Floating-point operations of a forward pass, counted matrix by matrix.

A product of n rows with an a × b matrix is 2 n a b operations. Per token of a layer, with q and kv
the widths of all query heads and all key or value heads, h the hidden and f the feed-forward width:

    linears    2 (h (q + 2 kv) + q h + 3 h f)
    attention  4 q (scores and their sum, per key that a token sees: i keys at position i)
    output     2 h V (a critic: 2 h), for the tokens whose logits are wanted

A backward pass is twice that. Norms, RoPE and the rest move bytes, and are in the share of the
peak that matrix products achieve. Packs have no padding and attention stays inside each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_prime.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences, as far as work goes."""

    tokens: float
    seen_keys: float  # sum over sequences of s (s + 1) / 2
    wanted: float  # tokens before a response token

    def __mul__(self, share: float) -> Load:
        return Load(self.tokens * share, self.seen_keys * share, self.wanted * share)


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one forward pass through the whole model."""

    linears: float  # in FP8 if anything is
    attention: float
    head: float

    @property
    def all(self) -> float:
        """Together."""
        return self.linears + self.attention + self.head


@lru_cache(maxsize=64)
def load_of(prompt: float, responses: tuple[int, ...]) -> Load:
    """Sequences of a prompt of mean length and one of the responses each."""
    lengths = [prompt + response for response in responses]
    return Load(
        tokens=sum(lengths),
        seen_keys=sum(length * (length + 1) / 2 for length in lengths),
        wanted=sum(responses),
    )


def linear_values(shape: ModelShape) -> int:
    """Values in the matrices of one layer."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return shape.hidden_size * (2 * q + 2 * kv + 3 * shape.ffn_size)


def forward_flops(shape: ModelShape, load: Load) -> Flops:
    """Of `load` through the whole model."""
    q = shape.num_heads * shape.head_dim
    return Flops(
        linears=2.0 * linear_values(shape) * shape.num_layers * load.tokens,
        attention=4.0 * q * shape.num_layers * load.seen_keys,
        head=2.0 * shape.hidden_size * shape.output_size * load.wanted,
    )
