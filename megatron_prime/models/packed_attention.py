"""Where the sequences of a pack lie, and how plain torch attends within each of them.

Transformer Engine's kernels read `cu_seqlens` and do the rest. Torch's fused attention on a CPU
knows no packs, and a mask over the whole pack would cost its length squared; so sequences of about
the same length are gathered into a padded batch (a bucket), attended causally, and put back. Only
attention pays for that padding, and `_CLOSE` bounds it; the linear layers, where the time goes, see
the pack.

Under context parallelism a rank has the queries of its own two chunks of each sequence, and needs
the keys and values of all ranks: they are gathered in rank order, and a bucket says where in the
gathered rows each sequence's keys are. A query then sees the keys at its own position and before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_CLOSE = 0.75  # the shortest sequence of a bucket against its longest


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length as a padded batch; row 0 stands in where there is no token."""

    queries: Tensor  # int64 [b, Lq], rows of this rank's tokens
    real: Tensor  # bool [b, Lq], where there is a token
    keys: Tensor  # int64 [b, L], rows of all ranks' tokens, gathered in rank order
    mask: Tensor | None  # bool [b, 1, Lq, L], which keys a query sees; None: causally, all its own

    def to(self, device: torch.device) -> Bucket:
        """The same on `device`."""
        mask = None if self.mask is None else self.mask.to(device)
        return Bucket(self.queries.to(device), self.real.to(device), self.keys.to(device), mask)


@dataclass
class Pack(PackedSeqParams):
    """Megatron's description of a pack, and what the torch attention needs beside it."""

    lengths: tuple[int, ...] = ()  # of the sequences over all context-parallel ranks
    cp_rank: int = 0
    cp_size: int = 1
    positions: Tensor = field(default_factory=lambda: torch.zeros(0))  # int64 [total], on the host
    wanted: Tensor | None = None  # int64 [n], the tokens of this rank whose logits are wanted
    _rotation: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], cp_rank: int, cp_size: int, device: torch.device) -> Pack:
        """Sequences of these lengths, each a multiple of 2 * cp_size if that is above 2."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            cp_rank=cp_rank,
            cp_size=cp_size,
            positions=torch.cat([torch.arange(length) for length in lengths]),
        )

    def rotation(self, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [S, 1, d] of RoPE's angles at this rank's tokens, made once for all
        layers; `inv_freq` [d / 2]."""
        if self._rotation is None:
            at = self.positions[self.tokens_of(self.cp_rank)].to(inv_freq.device)
            angles = torch.outer(at.float(), inv_freq).repeat(1, 2)[:, None]
            self._rotation = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._rotation

    def tokens_of(self, cp_rank: int) -> Tensor:
        """Which of the pack's tokens a context-parallel rank holds, in its order: int64 [S]."""
        if self.cp_size == 1:
            return torch.arange(len(self.positions))
        chunk = torch.tensor(self.lengths).div(2 * self.cp_size, rounding_mode="floor")
        number = self.positions // chunk.repeat_interleave(torch.tensor(self.lengths))
        mine = (number == cp_rank) | (number == 2 * self.cp_size - 1 - cp_rank)
        return mine.nonzero().squeeze(1)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """All sequences, the longest first, on the pack's device."""
        held = self.tokens_of(self.cp_rank)
        gathered = torch.cat([self.tokens_of(rank) for rank in range(self.cp_size)])
        row_of = torch.empty_like(gathered)  # by number of the token in the pack
        row_of[gathered] = torch.arange(len(gathered))
        of_rank = [length // self.cp_size for length in self.lengths]
        queries = torch.arange(len(held)).split(of_rank)
        positions = self.positions[held].split(of_rank)
        keys = row_of.split(list(self.lengths))
        buckets = [
            _bucket(
                [queries[i] for i in chosen],
                [keys[i] for i in chosen],
                [positions[i] for i in chosen] if self.cp_size > 1 else None,
            )
            for chosen in _similar(self.lengths)
        ]
        return [bucket.to(self.cu_seqlens_q.device) for bucket in buckets]

    @cached_property
    def restore(self) -> Tensor:
        """Which row of the buckets' outputs, one after the other, a token is: int64 [S]."""
        rows = torch.cat([bucket.queries[bucket.real] for bucket in self.buckets])
        real = torch.cat([bucket.real.flatten() for bucket in self.buckets])
        restore = torch.empty_like(rows)
        restore[rows] = real.nonzero().squeeze(1)
        return restore

    @cached_property
    def is_one_batch(self) -> bool:
        """Whether the tokens are a batch of equally long rows as they lie."""
        return self.cp_size == 1 and len(set(self.lengths)) == 1


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Sequence numbers, longest first, cut where they get too short for the bucket."""
    buckets: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if buckets and lengths[i] >= _CLOSE * lengths[buckets[-1][0]]:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return buckets


def _bucket(queries: list[Tensor], keys: list[Tensor], positions: list[Tensor] | None) -> Bucket:
    rows = pad_sequence(queries, batch_first=True, padding_value=-1)
    padded_keys = pad_sequence(keys, batch_first=True)
    mask = None
    if positions is not None:
        at = pad_sequence(positions, batch_first=True)
        mask = (torch.arange(padded_keys.shape[1]) <= at[..., None])[:, None]
    return Bucket(rows.clamp(min=0), rows >= 0, padded_keys, mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of queries or keys [S, heads, d], by halves as Hugging Face's models have it."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)


def attend(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
    """Causal grouped-query attention within each sequence of `pack`.

    `query` [S, heads, d] of this rank; `key` and `value` [S * cp, kv heads, d] of all ranks in rank
    order. Returns [S, heads * d].
    """
    if pack.is_one_batch:
        rows = len(pack.lengths)
        q, k, v = (x.unflatten(0, (rows, -1)) for x in (query, key, value))
        return _attend(q, k, v, None, scale).flatten(0, 1)
    outputs = [
        _attend(
            _rows(query, bucket.queries),
            _rows(key, bucket.keys),
            _rows(value, bucket.keys),
            bucket.mask,
            scale,
        ).flatten(0, 1)
        for bucket in pack.buckets
    ]
    return torch.cat(outputs).index_select(0, pack.restore)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One padded batch [b, L, heads, d]; returns [b, Lq, heads * d]."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2).flatten(2)
