"""What ends each step of a stage, as in the loop of PRIME: its line, a checkpoint, a stop.

A stage has one model, and a stream that gives it mini-batches. Its loop is its own; here is what
all of them share, so that each is killed, signalled and continued as a PRIME run is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_prime.config import due
from megatron_prime.errors import Interrupted
from megatron_prime.protocols import Checkpoints, Recorder, StopSignals
from megatron_prime.types import LoopState, Metrics


@dataclass(frozen=True, slots=True)
class StageSteps:
    """The steps that are left; iterate over their numbers."""

    done: int  # by a checkpoint; 0: this is the start
    last: int
    save_every: int
    judge_every: int  # on what is held out
    recorder: Recorder
    checkpoints: Checkpoints
    signals: StopSignals

    def __iter__(self) -> Iterator[int]:
        """From the first that is not done to the last."""
        return iter(range(self.done + 1, self.last + 1))

    def begin(self, metrics: Metrics) -> None:
        """Record what was found before the first step."""
        self.recorder.log(0, metrics)

    def judged(self, step: int) -> bool:
        """Whether held-out examples are looked at after `step`."""
        return due(step, self.judge_every, self.last)

    def end(self, step: int, metrics: Metrics) -> None:
        """Record the step, and save if it is time or somebody asked to end; then Interrupted."""
        self.recorder.log(step, metrics)  # before saving: a resumed run lacks no step's line
        if (stop := self.signals.asked()) or due(step, self.save_every, self.last):
            self.checkpoints.save(LoopState(step))
        if stop:
            raise Interrupted(f"{stop}: saved step {step}; the same command continues from there")
