"""What a competent user writes with `transformers` and plain torch, without this project.

Rows sorted by length share padded micro-batches of a token budget; padding is on the right, so that
a causal model needs no mask; only response tokens ever meet the output layer. AdamW is torch's
fused one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prime.config import PolicySection
from megatron_prime.types import RolloutBatch, TrainBatch


class PlainModel:
    """A Hugging Face model with scoring and the clipped policy update."""

    def __init__(self, model: Path, knobs: PolicySection) -> None:
        """Load the checkpoint; norms and biases are exempt from weight decay."""
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.knobs = knobs
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": knobs.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=knobs.lr,
            betas=knobs.betas,
            eps=knobs.eps,
            fused=True,
        )

    @torch.no_grad()
    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses: float32 [N, T], 0 on padding."""
        found = torch.zeros(batch.response_mask.shape)
        for rows, tokens in self._micro_batches(batch):
            found[rows] = self._responses(batch, rows, tokens, found.shape[1])
        return found

    def update(self, batch: TrainBatch) -> float:
        """One optimizer step of the clipped loss, mean over rows of token means; the loss."""
        rollouts, total = batch.scored.rollouts, 0.0
        for rows, tokens in self._micro_batches(rollouts):
            mask = rollouts.response_mask[rows]
            new = self._responses(rollouts, rows, tokens, mask.shape[1])
            ratio = (new - batch.scored.old_logprobs.logprobs[rows]).exp()
            clipped = ratio.clamp(1 - self.knobs.loss.clip, 1 + self.knobs.loss.clip)
            gain = torch.minimum(ratio * batch.advantages[rows], clipped * batch.advantages[rows])
            means = (gain * mask).sum(1) / mask.sum(1)
            loss = -means.sum() / len(rollouts.sequences)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.knobs.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _micro_batches(self, batch: RolloutBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers [b] and tokens [b, S], longest rows first."""
        lengths = [len(sequence.token_ids) for sequence in batch.sequences]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        while order:
            width = lengths[order[0]]
            count = max(1, self.knobs.micro_batch_tokens // width)
            rows, order = order[:count], order[count:]
            tokens = [torch.tensor(batch.sequences[row].token_ids) for row in rows]
            yield torch.tensor(rows), torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)

    def _responses(self, batch: RolloutBatch, rows: Tensor, tokens: Tensor, width: int) -> Tensor:
        """Log-probs of the rows' response tokens: [b, width], 0 on padding."""
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        prompts = torch.tensor([batch.sequences[row].prompt_length for row in rows.tolist()])
        row, column = batch.response_mask[rows].nonzero(as_tuple=True)
        at = prompts[row] + column
        logits = self.model.lm_head(hidden[row, at - 1]).float()
        chosen = logits.log_softmax(-1).gather(-1, tokens[row, at, None]).squeeze(-1)
        return chosen.new_zeros(len(rows), width).index_put((row, column), chosen)
