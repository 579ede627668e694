"""The output layer of a critic: one number for each token, in the place of logits.

It is too small to be cut, so every tensor-parallel rank has all of it. Without sequence parallelism
each rank sees all tokens, computes the same values and has the whole gradient. With it a rank has
the hidden states of its own tokens only: it makes their values and the ranks gather those, which
are h times smaller than the hidden states that logits would want. Then each has a part of the
weight's gradient; the mark on the weight makes Megatron sum them. Backwards, every rank has the
same loss, so the gradient of the gathered values is cut and not summed.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ValueHead(torch.nn.Module):
    """Takes the place of GPTModel's `output_layer`; it begins at 0 until weights are loaded."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        like = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, **like))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Of hidden states [S, 1, h], or this rank's share of them: fp32 [S, 1, 1], all of them.

        The product is in fp32, for what a value differs by from a return may be small. The other
        arguments are those of Megatron's output layers.
        """
        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
