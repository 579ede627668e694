"""Forward, backward and optimizer step of one Megatron-core model; the same code on gloo and NCCL.

Megatron's own parts do the work: its pipeline schedules, DDP, `finalize_model_grads`, clipping and
optimizer. This file adds what reinforcement learning needs around them: log-probs of the response
tokens of any rows, assembled on every rank, and losses that are sums over the whole mini-batch.

Scaling. A loss function returns its micro-batch's share of the mini-batch loss, so that the shares
of all micro-batches of all data-parallel ranks add up to it. Megatron divides each micro-batch's
loss by their number and each gradient by the data-parallel size; `share` multiplies both back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import get_standard_config_overrides as exempt_norms_and_biases
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prime.config import BatchSection, PrecisionOptions
from megatron_prime.errors import NotFinite
from megatron_prime.models.architecture import ModelShape
from megatron_prime.models.logprobs import vocab_parallel_logprobs_and_entropy
from megatron_prime.models.micro_batch import Grid, MicroBatch, cut
from megatron_prime.models.precision import ddp_options, optimizer_options
from megatron_prime.precision_rules import token_multiple
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.types import TokenSequence


@dataclass(frozen=True, slots=True)
class Forward:
    """What a loss function sees of one micro-batch: b rows, T the longest response among them."""

    rows: Tensor  # int64 [b], rows of the batch
    logprobs: Tensor  # float32 [b, T], of the response tokens; anything beyond a row's response
    entropy: Tensor  # float32 [b, T], of the distribution that predicted the token
    loss: Tensor | float = 0.0  # this micro-batch's share, once it is known


# The distributed optimizer's default format can't be saved by this version's dist_checkpointing
# (mapping.py:133 refuses flattened ranges); this one can, and loads in any layout.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}

Loss = Callable[[Forward], Tensor]  # scalar: this micro-batch's share of the mini-batch loss


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, the same on every rank. Rows that were not in the step hold zeros."""

    updated: bool  # False when fp16 gradients overflowed: the step was skipped, the scale adapted
    loss: float
    grad_norm: float  # before clipping; NaN of a skipped step
    logprobs: Tensor  # float32 [N, T], from the training forward, before the step
    entropy: Tensor  # float32 [N, T]
    loss_scale: float = 1.0  # that this step's gradients were scaled by; 1 but for fp16


class Engine:
    """One model, frozen or trained: this rank's shards of it and their place in the pipeline."""

    def __init__(
        self, chunks: Sequence[Any], shape: ModelShape, max_tokens: int, temperature: float
    ) -> None:
        """`chunks` as `build_model` makes them, one for each virtual pipeline stage."""
        self.modules = tuple(chunks)  # the GPTModels themselves, out of any wrapper
        self.chunks = list(chunks)
        self.shape = shape
        self.max_tokens = max_tokens  # of one micro-batch on one rank
        self.temperature = temperature  # logits are divided by it
        self.grid = grid_of(chunks[0].config, next(chunks[0].parameters()).device)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Log-probs of all response tokens: float32 [N, T] on every rank's host, 0 on padding."""
        outputs = self._schedule(sequences, range(len(sequences)), loss=None)
        return self._assemble(outputs, sequences)[0]

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
        logits: Tensor,  # [1, S, V / tp]
        non_loss_data: bool = False,
    ) -> Any:
        """What the last stage does with logits: log-probs, entropy and, in training, the loss."""
        found = vocab_parallel_logprobs_and_entropy(
            logits[0].index_select(0, batch.predicts_at).float() / self.temperature,
            batch.targets,
            self.shape.vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
        )
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


class TrainableEngine(Engine):
    """An Engine with gradients, fp32 master weights and a learning-rate schedule."""

    def __init__(
        self,
        chunks: Sequence[Any],
        shape: ModelShape,
        knobs: BatchSection,
        temperature: float,
        total_steps: int,
        precision: PrecisionOptions,
    ) -> None:
        super().__init__(chunks, shape, knobs.micro_batch_tokens, temperature)
        self.precision = precision
        on_gpu = self.grid.device.type == "cuda"
        # The distributed optimizer does not resume exactly on a CPU (docs/decisions/0003).
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=on_gpu,
            overlap_grad_reduce=on_gpu,
            **ddp_options(precision),
        )
        with megatron_calls():
            self.chunks = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
            self.optimizer = make_optimizer(self.chunks, knobs, precision, on_gpu)
        no_sync = [chunk.no_sync for chunk in self.chunks]
        config = chunks[0].config  # one object for all chunks
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=knobs.lr,
            min_lr=0.0,
            lr_warmup_steps=knobs.warmup_steps,
            # One more than the run, so that the last step still has a rate above 0.
            lr_decay_steps=max(total_steps, knobs.warmup_steps) + 1,
            lr_decay_style=knobs.schedule,
            start_wd=knobs.weight_decay,
            end_wd=knobs.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def next_rate(self) -> float:
        """Move the schedule on by one step and return the learning rate from now on."""
        self.schedule.step(increment=1)
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(
        self, sequences: Sequence[TokenSequence], rows: Sequence[int], loss: Loss
    ) -> StepResult:
        """One optimizer step on `rows`.

        Raises NotFinite on every rank, before any weight changes, when the loss, a log-prob or a
        gradient is not finite on any. Only fp16 gradients may be, while their scale can still fall:
        Megatron's optimizer then skips the step.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._schedule(sequences, rows, loss)
        logprobs, entropy, value = self._assemble(outputs, sequences)
        forward_is_finite = math.isfinite(value) and bool(logprobs.isfinite().all())
        scale = float(self.optimizer.get_loss_scale())
        if not forward_is_finite or not (self._can_skip(scale) or self._gradients_are_finite()):
            raise NotFinite(
                f"a mini-batch of {len(rows)} rollouts gave a loss of {value}, and log-probs or "
                f"gradients (of {scale:g} times the loss) that are not all finite; no weight was "
                "changed. Lower the learning rate (lr), or look at grad_norm of the last steps"
            )
        with megatron_calls():
            updated, grad_norm, _ = self.optimizer.step()
        norm = math.nan if grad_norm is None else float(grad_norm)
        return StepResult(bool(updated), value, norm, logprobs, entropy, scale)

    def _can_skip(self, scale: float) -> bool:
        """Whether an overflow may be the loss scale's fault, which the optimizer then lowers."""
        adapts = self.precision.dtype == "fp16" and self.precision.loss_scale is None
        return adapts and scale > self.precision.min_loss_scale

    def _gradients_are_finite(self) -> bool:
        """The same answer on every rank."""
        finite = [
            buffer.grad_data.isfinite().all() for chunk in self.chunks for buffer in chunk.buffers
        ]
        broken = (~torch.stack(finite).all()).float()
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
        return not bool(broken)

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Everything of this engine that a checkpoint keeps, for Megatron's dist_checkpointing."""
        with megatron_calls():
            metadata = dict(_RESHARDABLE)  # Megatron adds its process groups
            model = {
                f"chunk{i}": module.sharded_state_dict(metadata=metadata)
                for i, module in enumerate(self.modules)
            }
            optimizer = self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state_dict` described and a checkpoint filled in."""
        with megatron_calls():
            for i, module in enumerate(self.modules):
                module.load_state_dict(state["model"][f"chunk{i}"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def grid_of(config: TransformerConfig, device: torch.device) -> Grid:
    """This rank's place in data, context and pipeline parallelism, as far as micro-batches care."""
    stages = config.pipeline_model_parallel_size
    sharing = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return Grid(
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        at_least=stages,
        multiple=stages if config.virtual_pipeline_model_parallel_size else 1,
        equal=stages > 1,
        token_multiple=token_multiple(config, sharing),
        device=device,
    )


def make_optimizer(
    chunks: list[Any], knobs: BatchSection, precision: PrecisionOptions, distributed: bool
) -> Any:
    """Megatron's AdamW; norms and biases are exempt from weight decay."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=knobs.lr,
        min_lr=0.0,
        weight_decay=knobs.weight_decay,
        adam_beta1=knobs.betas[0],
        adam_beta2=knobs.betas[1],
        adam_eps=knobs.eps,
        clip_grad=knobs.clip_grad,
        use_distributed_optimizer=distributed,
        **optimizer_options(precision),
    )
    return get_megatron_optimizer(config, chunks, exempt_norms_and_biases(config))
