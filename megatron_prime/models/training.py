"""An Engine that learns: gradients, fp32 master weights, learning-rate schedule, optimizer step.

Megatron's own parts do the work: its DDP, `finalize_model_grads`, clipping and optimizer. Before
the optimizer sees them, loss, log-probs and gradients are checked on all ranks: one that is not
finite stops the step on every rank before any weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import get_standard_config_overrides as exempt_norms_and_biases
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_prime.config import BatchSection, PrecisionOptions
from megatron_prime.errors import NotFinite
from megatron_prime.models.architecture import ModelShape
from megatron_prime.models.engine import Engine, Loss, broken_rows, culprits
from megatron_prime.models.precision import ddp_options, optimizer_options
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.types import TokenSequence

# The distributed optimizer's default format can't be saved by this version's dist_checkpointing
# (mapping.py:133 refuses flattened ranges); this one can, and loads in any layout. It gathers a
# bucket's shards on one data-parallel rank's host to save them: slower, and not measured yet.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, the same on every rank. Rows that were not in the step hold zeros."""

    updated: bool  # False when fp16 gradients overflowed: the step was skipped, the scale adapted
    loss: float
    grad_norm: float  # before clipping; NaN of a skipped step
    logprobs: Tensor  # float32 [N, T], from the training forward, before the step; or values
    entropy: Tensor  # float32 [N, T]
    loss_scale: float = 1.0  # that this step's gradients were scaled by; 1 but for fp16


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

    @property
    def optimizers(self) -> list[Any]:
        """torch's optimizers, inside Megatron's."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part.optimizer for part in parts]

    def remake_weights(self) -> None:
        """Fill 16-bit weights from the masters as an optimizer step does, bit for bit; collective.

        Their content of before is not looked at.
        """
        with megatron_calls():
            for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                part._copy_main_params_to_model_params()
            for chunk in self.chunks:
                if chunk.ddp_config.use_distributed_optimizer:  # each rank has made its shard
                    chunk.start_param_sync(force_sync=True)

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
        if not forward_is_finite or not (self._can_skip() or self._gradients_are_finite()):
            found = broken_rows(outputs, self.gives) + self._broken_gradients()
            raise NotFinite(
                f"a mini-batch of {len(rows)} rollouts gave numbers that are not finite (loss "
                f"{value}, scaled by {scale:g}); no weight was changed:\n{culprits(found)}\n"
                "Lower the learning rate (lr), or look at grad_norm of the last steps"
            )
        with megatron_calls():
            updated, grad_norm, _ = self.optimizer.step()
        norm = math.nan if grad_norm is None else float(grad_norm)
        return StepResult(bool(updated), value, norm, logprobs, entropy, scale)

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by now, where that adapts itself; None elsewhere."""
        adapts = self.precision.dtype == "fp16" and self.precision.loss_scale is None
        return float(self.optimizer.get_loss_scale()) if adapts else None

    def set_loss_scale(self, scale: float) -> None:
        """Go on with `scale`. Only for an engine whose `loss_scale` is not None."""
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part.get_loss_scale().fill_(scale)  # the scaler's own tensor

    def _can_skip(self) -> bool:
        """Whether an overflow may be the loss scale's fault, which the optimizer then lowers."""
        scale = self.loss_scale
        return scale is not None and scale > self.precision.min_loss_scale

    def _gradients_are_finite(self) -> bool:
        """The same answer on every rank.

        The smallest and the largest value tell: a NaN is both, an infinity is one of them. Unlike
        `isfinite`, which makes 7 bytes for each value, they need no memory.
        """
        extremes = [
            extreme
            for chunk in self.chunks
            for buffer in chunk.buffers
            for extreme in buffer.grad_data.aminmax()
        ]
        broken = (~torch.stack(extremes).isfinite().all()).float()
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
        return not bool(broken)

    def _broken_gradients(self) -> list[str]:
        return [
            f"gradient of {name}"
            for name, parameter in self._parameters()
            if parameter.requires_grad and not parameter.main_grad.isfinite().all()
        ]

    def broken_weights(self) -> list[str]:
        """This rank's weights that are not finite: a rate too large, or beyond fp16's range."""
        return [name for name, weight in self._parameters() if not weight.isfinite().all()]

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        for i, module in enumerate(self.modules):
            yield from module.named_parameters(f"chunk{i}" if i else "")

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Everything of this engine that a checkpoint keeps, for Megatron's dist_checkpointing."""
        with megatron_calls():
            metadata = dict(_RESHARDABLE)  # Megatron adds its process groups
            model = self.sharded_weights()
            optimizer = self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state_dict` described and a checkpoint filled in."""
        with megatron_calls():
            self.load_weights(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


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
