"""A trained model as a Hugging Face checkpoint directory that transformers, vLLM or SGLang load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_prime.config import ConfigError
from megatron_prime.weights.companions import other_files
from megatron_prime.weights.gather import gather_hf_tensors
from megatron_prime.weights.raw_safetensors import SHARD_BYTES
from megatron_prime.weights.safetensors_io import write_hf_checkpoint
from megatron_prime.weights.shape import ModelShape


def export_hf(
    chunks: Sequence[torch.nn.Module],
    shape: ModelShape,
    source_dir: Path,
    out_dir: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model of `chunks` with the config and tokenizer of `source_dir` to `out_dir`.

    Collective over all ranks; rank 0 writes, and the files are there when any rank returns. They
    appear only when all are written. ConfigError if it would overwrite `source_dir`.
    """
    if out_dir.resolve() == source_dir.resolve():
        raise ConfigError(
            f"the export would overwrite its source {source_dir}; choose another path"
        )
    if parallel_state.get_data_parallel_rank() == 0:  # the replica of rank 0
        tensors = gather_hf_tensors(chunks, shape)
        if dist.get_rank() == 0:
            dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
            write_hf_checkpoint(
                tensors, other_files(source_dir, dtype, shape.value_head), out_dir, shard_bytes
            )
        else:
            for _ in tensors:  # take part in the collectives
                pass
    dist.barrier()
