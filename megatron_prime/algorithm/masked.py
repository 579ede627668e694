"""Arithmetic on padded [N, T] tensors, and the checks this package makes of them.

Row i is one response, rows of one group are contiguous, and `response_mask` is true on the
response's tokens, the end-of-sequence token included. What stands elsewhere means nothing and may
be NaN or Inf; therefore padding is replaced by 0 before any arithmetic (NaN * 0 is NaN, in values
and in gradients). Numbers are float32 at least, and float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def zero_padding(values: Tensor, mask: Tensor) -> Tensor:
    """`values`, broadcast to the bool `mask`, with 0 outside it; float32 at least."""
    return torch.where(mask, at_least_float32(values), 0.0)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the values inside the mask, over `dim` or over everything."""
    return zero_padding(values, mask).sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values inside the mask, over `dim` or over everything; NaN where it is empty."""
    return masked_sum(values, mask, dim) / mask.sum(dim=dim)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance (over n - 1) of all n values inside the mask; 0 for a single one."""
    squares = (zero_padding(values, mask) - masked_mean(values, mask)).square()
    return masked_sum(squares, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(
    values: Tensor, mask: Tensor, counted: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + eps) over all values inside the mask, 0 outside.

    `counted` (bool [N]): mean and variance are of these rows' values alone.
    """
    of = mask if counted is None else mask & counted[:, None]
    centred = zero_padding(values, mask) - masked_mean(values, of)
    return zero_padding(centred / (masked_variance(values, of) + eps).sqrt(), mask)


def by_group(values: Tensor, group_size: int) -> Tensor:
    """View one value per row, [N], as one row per group, [N / group_size, group_size].

    Raises ValueError if the values are not [N] or do not fill whole groups.
    """
    if values.ndim != 1 or group_size < 1 or values.numel() % group_size:
        raise ValueError(
            f"found values of shape {list(values.shape)} and group_size {group_size}, wanted [N]"
            " with N a multiple of group_size: all responses to a prompt, in adjacent rows; set"
            " rollout.group_size to their number"
        )
    return values.reshape(-1, group_size)


def check_tokens(response_mask: Tensor, **token_tensors: Tensor) -> None:
    """Raise ValueError unless the mask is bool [N, T], no row is empty and all shapes are its."""
    if response_mask.dtype != torch.bool or response_mask.ndim != 2 or not response_mask.numel():
        raise ValueError(
            f"response_mask: found {response_mask.dtype} {list(response_mask.shape)}, wanted"
            " torch.bool [N, T] with N and T at least 1; pass mask.bool(), one row per response"
        )
    for name, tensor in token_tensors.items():
        if tensor.shape != response_mask.shape:
            raise ValueError(
                f"{name}: found shape {list(tensor.shape)}, wanted {list(response_mask.shape)}, the"
                " shape of response_mask; pad all tensors of a batch to the same T"
            )
    empty = ~response_mask.any(dim=1)
    if empty.any():
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(
            f"response_mask: found {len(rows)} rows without a token (first: {rows[:4]}), wanted at"
            " least one in each; count the end-of-sequence token as part of the response, or drop"
            " these rollouts"
        )


def check_rows(response_mask: Tensor, **row_tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has one value per row of the mask, [N]."""
    for name, tensor in row_tensors.items():
        if tensor.shape != response_mask.shape[:1]:
            raise ValueError(
                f"{name}: found shape {list(tensor.shape)}, wanted {list(response_mask.shape[:1])},"
                " one value per row of response_mask; take both from the same batch"
            )
