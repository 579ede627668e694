"""Forward and backward of one Megatron-core model; the same code on gloo and NCCL.

Megatron's pipeline schedules do the work. This file adds what reinforcement learning needs around
them: log-probs of the response tokens of any rows, assembled on every rank, and losses that are
sums over the whole mini-batch. `training.py` adds the optimizer.

Scaling. A loss function returns its micro-batch's share of the mini-batch loss, so that the shares
of all micro-batches of all data-parallel ranks add up to it. Megatron divides each micro-batch's
loss by their number and each gradient by the data-parallel size; `share` multiplies both back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prime.errors import NotFinite
from megatron_prime.models.architecture import ModelShape
from megatron_prime.models.logprobs import vocab_parallel_logprobs_and_entropy
from megatron_prime.models.micro_batch import Grid, MicroBatch, cut
from megatron_prime.precision_rules import token_multiple
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.types import TokenSequence


@dataclass(frozen=True, slots=True)
class Forward:
    """What a loss function sees of one micro-batch: b rows, T the longest response among them.

    A model with a value head gives no log-probs: `values` are where they would be.
    """

    rows: Tensor  # int64 [b], rows of the batch
    logprobs: Tensor  # float32 [b, T], of the response tokens; anything beyond a row's response
    entropy: Tensor  # float32 [b, T], of the distribution that predicted the token; of values 0
    loss: Tensor | float = 0.0  # this micro-batch's share, once it is known

    def select(self, kept: Tensor) -> Forward:
        """Only the rows that are `kept` (bool [b])."""
        return Forward(self.rows[kept], self.logprobs[kept], self.entropy[kept])

    @property
    def values(self) -> Tensor:
        """What a critic expects before each response token: float32 [b, T]."""
        return self.logprobs


_NAMED = 5  # culprits of a rank that are named
Loss = Callable[[Forward], Tensor]  # scalar: this micro-batch's share of the mini-batch loss


class Engine:
    """One model, frozen or trained: this rank's shards of it and their place in the pipeline."""

    gives = "log-probs"  # of each response token

    def __init__(
        self, chunks: Sequence[Any], shape: ModelShape, max_tokens: int, temperature: float
    ) -> None:
        """`chunks` as `build_model` makes them, one for each virtual pipeline stage."""
        self.modules = tuple(chunks)  # the GPTModels themselves, out of any wrapper
        self.chunks = list(chunks)
        self.shape = shape
        self.max_tokens = max_tokens  # of one micro-batch on one rank
        self.temperature = temperature  # logits are divided by it
        if shape.value_head:
            self.gives = "values"
        self.grid = grid_of(chunks[0].config, next(chunks[0].parameters()).device)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Log-probs of all response tokens: float32 [N, T] on every rank's host, 0 on padding.

        Of a model with a value head, its values before each of them. Raises NotFinite on every rank
        when one is not finite.
        """
        outputs = self._schedule(sequences, range(len(sequences)), loss=None)
        found = self._assemble(outputs, sequences)[0]
        if not found.isfinite().all():
            told = culprits(broken_rows(outputs, self.gives))
            raise NotFinite(f"{self.gives} are not finite:\n{told}")
        return found

    def sharded_weights(self) -> dict[str, Any]:
        """The weights alone, for Megatron's dist_checkpointing."""
        return {
            f"chunk{i}": module.sharded_state_dict(metadata={})
            for i, module in enumerate(self.modules)
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_weights` described and a checkpoint filled in."""
        for i, module in enumerate(self.modules):
            module.load_state_dict(state[f"chunk{i}"])

    def _schedule(
        self, sequences: Sequence[TokenSequence], rows: Sequence[int], loss: Loss | None
    ) -> list[Forward]:
        """Run Megatron's schedule over `rows`; outputs exist on the last pipeline stage only."""
        micro_batches = cut(sequences, rows, self.max_tokens, self.grid)
        share = float(len(micro_batches) * self.grid.dp_size)

        def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(batches)
            output = model(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=None,
                packed_seq_params=batch.pack,
            )
            return output, partial(self._after_forward, batch, loss, share)

        iterators = [iter(micro_batches) for _ in self.chunks]
        virtual = len(self.chunks) > 1
        with megatron_calls():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if virtual else iterators[0],
                model=self.chunks if virtual else self.chunks[0],
                num_microbatches=len(micro_batches),
                seq_length=micro_batches[0].tokens.shape[1] * self.grid.cp_size,
                micro_batch_size=1,
                forward_only=loss is None,
                collect_non_loss_data=loss is None,
            )

    def _after_forward(
        self,
        batch: MicroBatch,
        loss: Loss | None,
        share: float,
        logits: Tensor,  # [1, n, V / tp], or values [1, n, 1]
        non_loss_data: bool = False,
    ) -> Any:
        """What the last stage does with logits: log-probs, entropy and, in training, the loss."""
        found = self._of_tokens(batch, logits)
        both = logits.new_zeros(2, len(batch.rows) * batch.width, dtype=torch.float32)
        both = both.index_copy(1, batch.slots, torch.stack(found))
        if self.grid.cp_size > 1:  # each rank has found its own tokens'; the loss wants whole rows
            both = reduce_from_tensor_model_parallel_region(
                both, group=parallel_state.get_context_parallel_group()
            )
        logprobs, entropy = both.unflatten(1, (-1, batch.width))
        forward = Forward(batch.rows, logprobs, entropy)
        if non_loss_data or loss is None:
            return forward
        value = loss(forward)
        kept = Forward(batch.rows, logprobs.detach(), entropy.detach(), value.detach())
        return value * share, kept

    def _of_tokens(self, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of this rank's response tokens, float32 [n], or values and 0."""
        if self.shape.value_head:
            return logits[0, :, 0], torch.zeros_like(logits[0, :, 0])
        if self.temperature != 1.0:
            logits = logits.float() / self.temperature
        return vocab_parallel_logprobs_and_entropy(
            logits[0],
            batch.targets,
            self.shape.vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
        )

    def _assemble(
        self, outputs: Sequence[Forward], sequences: Sequence[TokenSequence]
    ) -> tuple[Tensor, Tensor, float]:
        """Log-probs and entropy [N, T] and the summed loss, brought together on every rank.

        Each row lives on one data-parallel replica's last stage, so a sum over all ranks with zeros
        everywhere else is exact.
        """
        device = self.grid.device
        lengths = torch.tensor([sequence.response_length for sequence in sequences])
        inside = torch.arange(int(lengths.max())) < lengths[:, None]
        both = torch.zeros(2, *inside.shape, device=device)
        loss = torch.zeros(1, dtype=torch.float64, device=device)
        # Tensor- and context-parallel neighbours have the same: one of them speaks.
        if parallel_state.get_tensor_model_parallel_rank() == self.grid.cp_rank == 0:
            for output in outputs:
                width = output.logprobs.shape[1]
                both[0, output.rows, :width] = output.logprobs
                both[1, output.rows, :width] = output.entropy
                loss += output.loss
        dist.all_reduce(both)
        dist.all_reduce(loss)
        both = torch.where(inside, both.cpu(), 0.0)
        return both[0], both[1], loss.item()


def grid_of(config: TransformerConfig, device: torch.device) -> Grid:
    """This rank's place in data, context and pipeline parallelism, as far as micro-batches care."""
    stages = config.pipeline_model_parallel_size
    sharing = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return Grid(
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        stages=stages,
        multiple=stages if config.virtual_pipeline_model_parallel_size else 1,
        token_multiple=token_multiple(config, sharing),
        device=device,
    )


def culprits(found: list[str]) -> str:
    """What each rank found to be not finite, a line a rank; collective."""
    per_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(per_rank, found)
    return "\n".join(
        f"rank {rank}: {', '.join(names[:_NAMED])}{f' and {more} more' if more > 0 else ''}"
        for rank, names in enumerate(per_rank)
        if (more := len(names) - _NAMED) > -_NAMED
    )


def broken_rows(outputs: Sequence[Forward], gives: str) -> list[str]:
    """Which rows have outputs or a share of the loss that are not finite, on this rank."""
    rows = [
        f"{gives} of row {int(row)}"
        for output in outputs
        for row, logprobs in zip(output.rows, output.logprobs, strict=True)
        if not logprobs.isfinite().all()
    ]
    losses = [
        f"loss of a micro-batch with rows {output.rows.tolist()}"
        for output in outputs
        if not torch.as_tensor(output.loss).isfinite()
    ]
    return rows + losses
