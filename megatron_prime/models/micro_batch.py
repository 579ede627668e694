"""From rows of ragged sequences to the padded tensors of one pipeline micro-batch.

Sequences start at position 0 and are padded on the right, so a causal model never sees the padding.
The logits at position p predict token p + 1: response token t of a row is predicted at position
`prompt_length - 1 + t`, and only those positions' logits are ever turned into log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prime.data.packing import plan_micro_batches
from megatron_prime.types import TokenSequence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """b rows of S tokens each, of which up to T per row are response tokens."""

    rows: Tensor  # int64 [b], rows of the batch this was cut from
    tokens: Tensor  # int64 [b, S]
    positions: Tensor  # int64 [b, S]
    predicts_at: Tensor  # int64 [b, T], position whose logits predict response token t
    targets: Tensor  # int64 [b, T], the response tokens; 0 beyond a row's response


def make_micro_batch(
    sequences: Sequence[TokenSequence], rows: Sequence[int], multiple: int, device: torch.device
) -> MicroBatch:
    """Pad `rows` of `sequences` to their longest, rounded up to `multiple` tokens."""
    chosen = [sequences[row] for row in rows]
    length = max(len(sequence.token_ids) for sequence in chosen)
    length += -length % multiple
    tokens = torch.zeros(len(chosen), length, dtype=torch.int64)
    for i, sequence in enumerate(chosen):
        tokens[i, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
    prompts = torch.tensor([sequence.prompt_length for sequence in chosen])
    responses = torch.tensor([sequence.response_length for sequence in chosen])
    steps = torch.arange(int(responses.max()))
    inside = steps < responses[:, None]
    first = prompts[:, None] + steps
    targets = tokens.gather(1, torch.where(inside, first, 0))
    return MicroBatch(
        rows=torch.tensor(list(rows), device=device),
        tokens=tokens.to(device),
        positions=torch.arange(length, device=device).expand(len(chosen), length).contiguous(),
        predicts_at=torch.where(inside, first - 1, 0).to(device),
        targets=torch.where(inside, targets, 0).to(device),
    )


def cut(
    sequences: Sequence[TokenSequence],
    rows: Sequence[int],
    dp_rank: int,
    dp_size: int,
    max_tokens: int,
    pipeline_stages: int,
    multiple: int,
    device: torch.device,
) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of `rows`: equally many and about equally large on
    all ranks, and at least one per pipeline stage where there are rows enough."""
    lengths = [len(sequences[row].token_ids) for row in rows]
    padded = [length + -length % multiple for length in lengths]
    enough = min(pipeline_stages, len(rows) // dp_size)
    plan = plan_micro_batches(padded, dp_size, max_tokens, min_micro_batches=enough)
    return [
        make_micro_batch(sequences, [rows[i] for i in micro_batch], multiple, device)
        for micro_batch in plan[dp_rank]
    ]
