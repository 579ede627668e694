"""Log-probabilities and entropy from logits that are split over the vocabulary.

Each tensor-parallel rank holds V / tp columns of the logits, and no rank ever holds all: the
softmax needs its maximum and three sums over the vocabulary, and those are all-reduced. With
z = logits and Z = sum_j exp z_j:

    log p_t = z_t - log Z                       d log p_t / d z_j = [j = t] - p_j
    H = log Z - sum_j p_j z_j                   d H / d z_j       = -p_j (log p_j + H)

Both are computed in fp32 from logits of any type. Columns beyond the real vocabulary take no part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A padded column's logit: exp gives exactly 0, and no product of it with a gradient overflows.
_NEVER = -1e30


def vocab_parallel_logprobs_and_entropy(
    logits_V: Tensor,  # [..., V / tp], this rank's columns; not overwritten
    targets: Tensor,  # int64 [...], in [0, vocab_size)
    vocab_size: int,  # columns of the whole, padded matrix that are real tokens
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy in nats: float32 [...] each, the same on every rank.

    Both can be differentiated; the loss made of them must be the same on every rank, too.
    """
    return _LogprobsAndEntropy.apply(logits_V, targets, vocab_size, tp_group)


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_V: Tensor, targets: Tensor, vocab_size: int, tp_group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        columns = logits_V.shape[-1]
        first = tp_group.rank() * columns
        real = vocab_size - first  # columns of this rank; those from here on are padding
        shifted_V = _in_fp32(logits_V, real)
        maximum = shifted_V.amax(-1)
        _reduce(maximum, dist.ReduceOp.MAX, tp_group)
        shifted_V = shifted_V - maximum[..., None]

        local = targets - first
        here = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        of_target = shifted_V.gather(-1, local[..., None]).squeeze(-1) * here
        exp_V = shifted_V.exp()
        sums = torch.stack((of_target, exp_V.sum(-1), exp_V.mul_(shifted_V).sum(-1)))
        _reduce(sums, dist.ReduceOp.SUM, tp_group)

        log_z = sums[1].log()
        entropy = log_z - sums[2] / sums[1]
        ctx.save_for_backward(logits_V, local, here, maximum + log_z, entropy)
        ctx.real = real
        ctx.set_materialize_grads(False)
        return sums[0] - log_z, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits_V, local, here, normaliser, entropy = ctx.saved_tensors
        logp_V = _in_fp32(logits_V, ctx.real) - normaliser[..., None]
        p_V = logp_V.exp()
        grad_V = torch.zeros(())
        if grad_entropy is not None:
            grad_V = logp_V.add_(entropy[..., None]).mul_(p_V).mul_(-grad_entropy[..., None])
        if grad_logprobs is not None:
            of_logprobs_V = p_V.mul_(-grad_logprobs[..., None])
            of_logprobs_V.scatter_add_(-1, local[..., None], (grad_logprobs * here)[..., None])
            grad_V = of_logprobs_V if grad_entropy is None else grad_V.add_(of_logprobs_V)
        return grad_V.to(logits_V.dtype), None, None, None


def _in_fp32(logits_V: Tensor, real: int) -> Tensor:
    """The logits in fp32, columns from `real` on as good as minus infinity; not always a copy."""
    if real >= logits_V.shape[-1]:
        return logits_V.float()
    padded_V = logits_V.to(torch.float32, copy=True)
    padded_V[..., max(real, 0) :] = _NEVER
    return padded_V


def _reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
