"""Policy, PRM, reference and a real SGLang server on one device, as `train` puts them together.

`build.train` without its loop, so that a stage can do one phase after the other and look between
them. What is measured around a phase is torch's peak, the driver's word and the ledger's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stage_measure import device_used, settled
from stage_sizes import prompts

from megatron_prime.algorithm.metrics import mismatch_kl
from megatron_prime.config import RunConfig
from megatron_prime.protocols import Phase
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.rendezvous import Rendezvous
from megatron_prime.types import (
    Group,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
)


@dataclass
class Watched:
    """What a phase took, the last time it was entered."""

    seconds: float = 0.0  # of the work, without the switch
    peak: int = 0  # of torch's allocator, buffers that stay included
    used: int = 0  # the driver's, all processes, at the end of the work


@dataclass
class Colocated:
    """All roles of a run on one rank."""

    config: RunConfig
    ranks: Any
    gpus: Any
    policy: Any
    prm: Any
    reference: Any
    engine: Any
    tokenizer: Any
    watched: dict[str, Watched] = field(default_factory=dict)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """One phase, watched."""
        with self.gpus.phase(phase):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = settled()
            yield
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            self.watched[phase.value] = Watched(settled() - started, peak, device_used())

    def sync(self) -> None:
        """The policy's weights into the server."""
        with self.phase(Phase.SYNC_WEIGHTS):
            self.engine.load_weights(self.policy.weights(), self.policy.version)

    def generate(self, count: int) -> list[Group]:
        """Groups of `count` prompts, sampled."""
        rollout = self.config.rollout
        sampling = Sampling(rollout.group_size, 1.0, rollout.max_response_length, 1)
        with self.phase(Phase.GENERATE):
            return list(self.engine.generate(prompts(self.tokenizer, count), sampling))

    def train(self, batch: RolloutBatch, look: Callable[[], None] = lambda: None) -> None:
        """Score, update both models; advantages are the centred outcome. `look`: while scoring."""
        with self.phase(Phase.SCORE):
            ref, old = self.reference.logprobs(batch), self.policy.old_logprobs(batch)
            look()
        scored = ScoredBatch(batch, old, ref)
        with self.phase(Phase.UPDATE_PRM):
            self.prm.update(scored)
        advantages = (batch.outcome_rewards[:, None] - 0.5) * batch.response_mask
        with self.phase(Phase.UPDATE_POLICY):
            self.policy.update(TrainBatch(scored, None, advantages))

    def step(self, count: int) -> RolloutBatch:
        """A whole step, its sync included."""
        batch = as_batch(self.generate(count))
        self.train(batch)
        self.sync()
        return batch

    def mismatch(self, batch: RolloutBatch) -> dict[str, float]:
        """Between the server's log-probs of `batch` and those of the policy as it is now."""
        return mismatch_kl(self.policy.logprobs(batch), batch.rollout_logprobs, batch.response_mask)

    def kill_server(self) -> int:
        """kill -9 of its main process; which one it was."""
        server = self.engine._group._server
        pid = int(server.pid)
        os.kill(pid, signal.SIGKILL)
        return pid

    def server_pid(self) -> int:
        """Of the server that is up now."""
        return int(self.engine._group._server.pid)


def as_batch(groups: Sequence[Group]) -> RolloutBatch:
    """Every second response was right, which no group needs a verifier for."""
    verified = [
        VerifiedGroup(
            group.prompt, group.rollouts, tuple(float(i % 2) for i in range(len(group.rollouts))), 0
        )
        for group in sorted(groups, key=lambda group: group.prompt.prompt_id)
    ]
    return RolloutBatch.from_groups(verified)


@contextmanager
def one_session(config: RunConfig) -> Iterator[Any]:
    """Process groups of one rank; its `ranks`, the launch that a server wants."""
    before_megatron_import()
    from megatron_prime import build

    launch = Launch(Rendezvous(), config.run.lost_after_s, config.run.timeout_s, saves=False)
    with build.training_session(config, launch, "train") as ranks:
        yield ranks, launch
    launch.finish()


@contextmanager
def colocated(config: RunConfig) -> Iterator[Colocated]:
    """All models loaded, the server up, nothing synced yet."""
    with one_session(config) as (ranks, launch), ExitStack() as stack:
        from megatron_prime import build
        from megatron_prime.data.chat import load_tokenizer
        from megatron_prime.devices import limits_of, models_on
        from megatron_prime.runtime.scheduler import PhaseScheduler

        Path(config.run.folder).mkdir(parents=True, exist_ok=True)
        gpus = PhaseScheduler(limits_of(config, ranks, 1), ranks.device)
        tokenizer = load_tokenizer(config.model.hf)
        models = models_on(gpus, config)
        nobody: Any = None  # neither prompts nor a verifier: responses are not judged here
        engine, _ = build.rollout_roles(
            config, launch, tokenizer, ranks, nobody, nobody, gpus, stack
        )
        yield Colocated(
            config, ranks, gpus, models.policy, models.prm, models.reference, engine, tokenizer
        )
