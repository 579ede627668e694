"""A checkpoint's tensors into this rank's Megatron parameters, reading only what it owns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prime.weights.layout import fuse, part_of
from megatron_prime.weights.names import VALUE_HEAD, hf_shapes, parameters_by_entry
from megatron_prime.weights.safetensors_io import HfCheckpoint
from megatron_prime.weights.shape import ModelShape


class Source(Protocol):
    """Whole tensors by their Hugging Face names, of which stretches are read."""

    def has(self, name: str, /) -> bool: ...  # noqa: D102
    def size(self, name: str, /) -> tuple[int, ...]: ...  # noqa: D102
    def read(self, name: str, stretch: tuple[slice, ...], /) -> Tensor: ...  # noqa: D102


def load_hf(chunks: Sequence[torch.nn.Module], hf_dir: Path, shape: ModelShape) -> None:
    """Fill all parameters of `chunks`, this rank's parts of a GPTModel, from `hf_dir`.

    No communication: every rank reads its slices of the files, and a tied output layer of the last
    pipeline stage reads the embedding. Values are converted to the parameters' type. A value head
    takes no notice of logits, and begins at 0 where the files have none. Raises WeightsError when
    they don't hold exactly the other tensors of `shape`.
    """
    checkpoint = HfCheckpoint(hf_dir)
    wanted = hf_shapes(shape)
    (head,) = VALUE_HEAD.hf
    if not checkpoint.has(head):
        wanted.pop(head, None)
    # Some exporters store the output layer of a tied model, too; transformers ignores it as well.
    unused = shape.tied_embeddings or shape.value_head
    checkpoint.check(wanted, may_ignore=["lm_head.weight"] if unused else [])
    load(chunks, checkpoint, shape)


@torch.no_grad()
def load(chunks: Sequence[torch.nn.Module], source: Source, shape: ModelShape) -> None:
    """Fill all parameters of `chunks` from a source that has the tensors of `shape`.

    A value head that it lacks is 0.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for entry, parameter, _ in parameters_by_entry(chunks, shape):
        if entry is VALUE_HEAD and not source.has(*entry.hf):
            parameter.zero_()
            continue
        parts = [
            source.read(name, part_of(entry.layout, source.size(name), shape, tp, rank))
            for name in entry.hf
        ]
        fill(parameter, fuse(entry.layout, parts, shape, tp))


def fill(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Give a parameter its value.

    An FP8 one is rounded by the copy. What it was initialised with is kept beside it for the fp32
    master weights (megatron/core/optimizer/distrib_optimizer.py), so that has to change, too.
    """
    parameter.copy_(value)
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        kept = value.to(device="cpu", dtype=parameter.dtype)
        parameter._high_precision_init_val = kept  # type: ignore[attr-defined]
