"""The same tokens through `transformers` and through Megatron, layer by layer.

Where log-probs differ, the first layer whose output differs says what to look at: a difference in
the embedding is a wrong name or padding, in the first layer usually RoPE or the order of heads,
deeper a layer's own weights; one that grows slowly from nothing is rounding. One process, no
parallelism: a wrong tensor-parallel layout is found by the tests of the layouts instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_prime.config import ParallelSizes, PrecisionOptions
from megatron_prime.models.architecture import ModelShape, build_model
from megatron_prime.models.engine import Engine
from megatron_prime.runtime import distributed
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.runtime.rendezvous import Rendezvous
from megatron_prime.types import TokenSequence


@dataclass(frozen=True, slots=True)
class Run:
    """What a model makes of T tokens."""

    logprobs: Tensor  # float32 [T - 1], of each token but the first
    states: dict[str, Tensor]  # float32 [T, hidden] on the CPU, by name, in the model's order


@torch.no_grad()
def through_transformers(hf_dir: Path, token_ids: Sequence[int]) -> Run:
    """`transformers` in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    inner = model.model
    states = _watch(inner.embed_tokens, inner.layers, inner.norm)
    tokens = torch.tensor([list(token_ids)])
    logp_V = model(tokens).logits[0, :-1].float().log_softmax(-1)
    return Run(logp_V.gather(-1, tokens[0, 1:, None])[:, 0], states)


def through_megatron(hf_dir: Path, checkpoint: Path, token_ids: Sequence[int]) -> Run:
    """Megatron in fp32 with the weights of a distributed checkpoint; `hf_dir` has its shape.

    Makes and destroys this process's groups.
    """
    distributed.initialize(Rendezvous(), ParallelSizes(), 0, 60.0)
    try:
        shape = ModelShape.from_hf(hf_dir)
        chunks = build_model(shape, PrecisionOptions(dtype="fp32"), {})
        engine = Engine(chunks, shape, len(token_ids), 1.0)
        with megatron_calls():
            wanted = {"model": engine.sharded_weights()}
            engine.load_weights(dist_checkpointing.load(wanted, str(checkpoint))["model"])
        (model,) = engine.modules
        decoder = model.decoder
        states = _watch(model.embedding, decoder.layers, decoder.final_layernorm)
        logprobs = engine.logprobs([TokenSequence(tuple(token_ids), 1)])[0]
    finally:
        distributed.destroy()
    return Run(logprobs, {name: state[: len(token_ids)] for name, state in states.items()})


def _watch(embedding: Any, layers: Sequence[Any], norm: Any) -> dict[str, Tensor]:
    """Where the outputs of these modules will be after a forward."""
    named = {"embedding": embedding}
    named |= {f"layer {i}": layer for i, layer in enumerate(layers)}
    named["final norm"] = norm
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[name] = hidden.detach().float().cpu().reshape(-1, hidden.shape[-1])

        return hook

    for name, module in named.items():
        module.register_forward_hook(keep(name))
    return states


def differences(one: Run, other: Run) -> dict[str, float]:
    """The largest difference of each output, in units of the largest value there."""
    return {
        name: float((other.states[name] - state).abs().max() / state.abs().max().clamp(min=1e-30))
        for name, state in one.states.items()
    }
