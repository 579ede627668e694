"""Attention inside packs against attention by hand, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
from megatron_prime.models.packed_attention import Pack, attend  # noqa: E402

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.3
CPU = torch.device("cpu")


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax over all earlier keys of the same sequence."""
    outputs = []
    per_row = [x.split(lengths) for x in (q, k, v)]
    for q_row, k_row, v_row in zip(*per_row, strict=True):
        heads = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = q_row[:, head] @ k_row[:, kv].T * SCALE
            hidden = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_row[:, kv])
        outputs.append(torch.cat(heads, dim=-1))
    return torch.cat(outputs)


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(
        torch.randn(tokens, heads, DIM, generator=generator).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


@pytest.mark.parametrize("lengths", [[5], [6, 6, 6], [1, 9, 2, 30, 28, 8, 1], [7, 5, 6, 3]])
def test_values_and_gradients(lengths: list[int]) -> None:
    q, k, v = inputs(sum(lengths))
    pack = Pack.of(lengths, 0, 1, CPU)
    weights = torch.randn(sum(lengths), HEADS * DIM)
    found, wanted = attend(q, k, v, pack, SCALE), by_hand(q, k, v, lengths)
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
    truth = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cp", [2, 3])
def test_context_parallel_ranks_find_their_part(cp: int) -> None:
    lengths = [2 * cp * n for n in (3, 1, 5, 4)]
    q, k, v = inputs(sum(lengths))
    wanted = by_hand(q, k, v, lengths)
    packs = [Pack.of(lengths, rank, cp, CPU) for rank in range(cp)]
    gathered = torch.cat([pack.tokens_of(rank) for rank, pack in enumerate(packs)])
    assert sorted(gathered.tolist()) == list(range(sum(lengths)))
    for rank, pack in enumerate(packs):
        mine = pack.tokens_of(rank)
        found = attend(q[mine], k[gathered], v[gathered], pack, SCALE)
        torch.testing.assert_close(found, wanted[mine])


def test_only_similar_lengths_share_a_padded_batch() -> None:
    pack = Pack.of([100, 10, 76, 74, 9, 1], 0, 1, CPU)
    shapes = [tuple(bucket.queries.shape) for bucket in pack.buckets]
    assert shapes == [(2, 100), (1, 74), (2, 10), (1, 1)]
    assert not pack.is_one_batch
