"""The layouts that the multi-process tests run in, by name."""

from __future__ import annotations

from typing import Any

from megatron_prime.config import ParallelSizes

LAYOUTS = {  # of four ranks; those that a replica leaves are data-parallel
    "tp1-pp1": ParallelSizes(),
    "tp2-pp1": ParallelSizes(tp=2),
    "tp1-pp2": ParallelSizes(pp=2),
    "tp2-pp2": ParallelSizes(tp=2, pp=2),
    "tp1-pp1-cp2": ParallelSizes(cp=2),
    "tp2-pp1-cp2": ParallelSizes(tp=2, cp=2),
    "tp1-pp2-cp2": ParallelSizes(pp=2, cp=2),
    "tp1-pp2-vpp2": ParallelSizes(pp=2, vpp=2),
    "tp2-pp2-vpp2": ParallelSizes(tp=2, pp=2, vpp=2),
}
OF_EIGHT = {"tp2-pp2-cp2": ParallelSizes(tp=2, pp=2, cp=2)}

MOVING = {  # of residence_cases.py: type, and whether the optimizer is distributed
    "tp2-pp1": ("bf16", False),
    "tp1-pp2-cp2": ("fp32", False),
    "tp1-pp2-vpp2": ("bf16", True),
    "tp2-pp1-cp2": ("bf16", True),
    "tp1-pp1": ("bf16", True),
}


def megatron_options(sizes: ParallelSizes) -> dict[str, Any]:
    """The `[megatron]` table of a layout."""
    options = {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "context_parallel_size": sizes.cp,
    }
    return options | ({"virtual_pipeline_model_parallel_size": sizes.vpp} if sizes.vpp > 1 else {})
