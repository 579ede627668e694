"""The frozen model in the PRM's log-ratio and the policy's KL: the SFT weights, never trained."""

from __future__ import annotations

from torch import Tensor

from megatron_prime.models.engine import Engine
from megatron_prime.models.guard import Guard
from megatron_prime.types import RolloutBatch


class MegatronReference:
    """A ScoringModel without optimizer or gradients."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        for module in engine.modules:
            module.requires_grad_(False)
        self.engine = engine
        self.guard = guard

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the responses at temperature 1: float32 [N, T]."""
        return self.guard.logprobs(self.engine, batch)
