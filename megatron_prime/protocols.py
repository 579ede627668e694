"""The roles the loop talks to.

`models/ rollout/ verify/ data/ runtime/` implement them; tests fake them. Every rank runs the same
loop. What a role returns to it is the same on every rank, except where a comment says "this
rank's": those values go through `Ranks.gather` before anything is decided from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from megatron_prime.config import FilterSection
from megatron_prime.types import (
    EvalSet,
    Group,
    LoopState,
    Metrics,
    OldLogprobs,
    PolicyUpdate,
    PrmUpdate,
    Prompt,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
)
from megatron_prime.value_batch import ValueBatch


class Phase(Enum):
    """What the devices are used for; the scheduler knows which buffers each phase needs."""

    GENERATE = "generate"
    SCORE = "score"
    UPDATE_PRM = "update_prm"
    UPDATE_CRITIC = "update_critic"
    UPDATE_POLICY = "update_policy"
    SYNC_WEIGHTS = "sync_weights"
    EVALUATE = "evaluate"
    CHECKPOINT = "checkpoint"


class PromptStream(Protocol):
    """An endless, shuffled, resumable stream of training prompts."""

    def take(self, count: int) -> list[Prompt]: ...
    def put_back(self, prompts: Sequence[Prompt]) -> None: ...  # they come first in the next take


class Tally(Protocol):
    """Counts, over all ranks, verified groups that may train; called from any thread."""

    def add(self, group: VerifiedGroup) -> None: ...  # each once, also those that don't count
    def reached(self) -> bool: ...  # whether there are enough; stays so


class WeightSource(Protocol):
    """Where an engine takes new weights from."""

    def whole(self) -> Iterator[tuple[str, Tensor]]: ...  # collective: Hugging Face names
    def stretch(self, hf: str) -> Tensor: ...  # what this rank holds of a tensor
    def forget(self) -> None: ...  # `stretch` may keep copies until then


class RolloutEngine(Protocol):
    """Samples responses with the policy's weights of `version`."""

    version: int  # -1 before the first load_weights

    def generate(  # once `enough` is reached, prompts may be left unanswered
        self, prompts: Sequence[Prompt], sampling: Sampling, enough: Tally | None = None
    ) -> Iterator[Group]: ...  # this rank's share, as they finish
    def take_metrics(self) -> Metrics: ...  # over all ranks, since the last call; collective
    def load_weights(self, weights: WeightSource, version: int) -> None: ...  # collective


class Verifier(Protocol):
    """Scores rollouts while the iterable still produces them."""

    def verify(  # `enough` is told each group as soon as its last check is done
        self, groups: Iterable[Group], enough: Tally | None = None
    ) -> list[VerifiedGroup]: ...  # this rank's


class Ranks(Protocol):
    """What the loop needs of the other ranks."""

    def tally(self, goal: int, window: FilterSection) -> Tally: ...  # a new one, at 0; collective

    # All ranks' groups, in the order of `prompts`: one for each, unless `enough` is reached.
    def gather(
        self,
        groups: Sequence[VerifiedGroup],
        prompts: Sequence[Prompt],
        enough: Tally | None = None,
    ) -> list[VerifiedGroup]: ...


class StepReader(Protocol):
    """Knows where the steps of a response end."""

    def step_ends(self, batch: RolloutBatch) -> Tensor | None: ...  # bool [N, T]; None: not asked


class ScoringModel(Protocol):
    """A model that gives log-probs, without gradients."""

    def logprobs(self, batch: RolloutBatch) -> Tensor: ...  # float32 [N, T], 0 on padding


class ProcessRewardModel(ScoringModel, Protocol):
    """The implicit PRM; a frozen one learns nothing in its update."""

    def update(self, batch: ScoredBatch) -> PrmUpdate: ...


class Critic(Protocol):
    """Says what rewards are to come; PPO's."""

    def values(self, batch: RolloutBatch) -> Tensor: ...  # float32 [N, T], 0 on padding
    def update(self, batch: ValueBatch) -> Metrics: ...


class Policy(Protocol):
    """The model that is trained by reinforcement."""

    version: int  # successful updates since the start of the run

    # Of the rows whose training forward comes after the update's first optimizer step, or of all.
    def old_logprobs(self, batch: RolloutBatch, every_row: bool = False) -> OldLogprobs: ...
    def update(self, batch: TrainBatch) -> PolicyUpdate: ...
    def weights(self) -> WeightSource: ...  # live; they change with the next update


class Scheduler(Protocol):
    """Owns the devices; a phase's buffers are in place inside the `with`."""

    def phase(self, phase: Phase) -> AbstractContextManager[None]: ...
    def take_seconds(self) -> Metrics: ...  # time/<phase>_s since the last call
    def take_memory(self) -> Metrics: ...  # memory/…_gib: peaks so far, moves since the last call


class Recorder(Protocol):
    """Shows and keeps figures."""

    def progress(self, note: str, done: int, total: int) -> None: ...  # live, never stored
    # Of a step before its checkpoint: so a resumed run lacks no step's line.
    def log(self, step: int, metrics: Metrics) -> None: ...
    def rollouts(self, step: int, groups: Sequence[VerifiedGroup]) -> None: ...  # if asked to


class Checkpoints(Protocol):
    """Saves everything that a run is, complete or not at all."""

    def save(self, state: LoopState) -> None: ...


class StopSignals(Protocol):
    """Hears whether the run should end soon: a time limit, preemption, a person."""

    def asked(self) -> str | None: ...  # the signal's name, if any rank got one


class Trained(Protocol):
    """A model with its optimizer, as a checkpoint sees it."""

    def broken_weights(self) -> list[str]: ...  # names of this rank's that are not finite
    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Cursor(Protocol):
    """A data stream that knows where it stands; its state is plain JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Versioned(Protocol):
    """Whoever counts the policy's updates."""

    version: int


@dataclass(frozen=True, slots=True)
class Roles:
    """Everyone who takes part in a step; built once by `build.py`."""

    prompts: PromptStream
    engine: RolloutEngine
    verifier: Verifier
    ranks: Ranks
    policy: Policy
    prm: ProcessRewardModel | None  # None: trained on the outcome alone
    reference: ScoringModel | None  # None: the policy is the PRM's, or nothing asks for one
    critic: Critic | None  # None: advantages compare with other rewards, or with nothing
    gpus: Scheduler
    recorder: Recorder
    checkpoints: Checkpoints
    signals: StopSignals
    steps: StepReader
    eval_prompts: Sequence[Prompt] = ()
    eval_sets: Sequence[EvalSet] = ()
