"""Which fused kernels a run has: said once, at its start.

Megatron takes Transformer Engine's fused Adam where that is installed, else NVIDIA's apex's, else
torch's AdamW; the same goes for clipping and scaling gradients, tensors by the list. Norms are
Transformer Engine's in its layers, fused with the matrix product that follows, and torch's RMSNorm
in plain torch layers (apex has one for LayerNorm only, which no model here has). Adding a weight's
gradient onto its fp32 sum inside the product (`gradient_accumulation_fusion`) wants apex's compiled
extension for the embedding and output layers. What falls back to torch computes the same, slower;
Megatron's own warnings about it are one for each import, so they are hidden (`runtime/compat.py`)
and this line takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer

_OWNERS = {"transformer_engine": "Transformer Engine", "apex": "apex", "torch": "torch"}


def kernels_line(megatron: Mapping[str, Any] | None = None) -> str:
    """Optimizer and norms of a run with these `[megatron]` options, and what would be faster."""
    adam, norms = optimizer_owner(), norms_owner(megatron or {})
    line = f"kernels: {adam}'s Adam, {norms}'s norms"
    if not torch.cuda.is_available():
        return f"{line} (no CUDA device)"
    if "torch" not in (adam, norms):
        return line
    if find_spec("transformer_engine") is None:
        return f"{line}; Transformer Engine, which is not installed, has fused ones"
    return (
        f'{line}; Transformer Engine\'s are fused: megatron.transformer_impl = "local" leaves them'
    )


def optimizer_owner() -> str:
    """Whose Adam Megatron has imported."""
    package = megatron_optimizer.Adam.__module__.partition(".")[0]
    return _OWNERS.get(package, package)


def norms_owner(megatron: Mapping[str, Any]) -> str:
    """Whose norms the layers have."""
    local = megatron.get("transformer_impl", "transformer_engine") == "local"
    return "torch" if local or not torch.cuda.is_available() else "Transformer Engine"


def has_fused_gradient_sums() -> bool:
    """Whether apex's extension for `gradient_accumulation_fusion` is there."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None
