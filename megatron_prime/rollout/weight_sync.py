"""One weight sync, from the live policy into the engines' processes, proved by checksums.

Every rank serves the engine process on its own device: it takes the rounds of the plan off the
other ranks and hands them over. An engine that dies or fails in the middle stops taking; the rounds
go on without it, for the other engines' sake. At the end the checksums that the senders took of
their live parameters are compared with those that the engine took of its own after loading.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch

from megatron_prime.protocols import WeightSource
from megatron_prime.weights.handover import Handover, HandoverError
from megatron_prime.weights.reshard import Reshard

LOADER = "megatron_prime.rollout.weight_loader.load"


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong with one engine."""

    text: str
    restart: bool  # False: the process is well, only its weights are not


class WeightSync:
    """This rank's side of all syncs of a run."""

    def __init__(self, reshard: Reshard, device: torch.device, timeout_s: float) -> None:
        """`timeout_s`: how long an engine may take over one round, and the trainer over the next.

        Allocates the two buffers; the engine opens them at its first sync.
        """
        self._reshard, self._timeout_s = reshard, timeout_s
        self._handover = Handover.create(reshard.layout(timeout_s), device)
        self._sync = 0
        self.longest_s = timeout_s * (1 + len(reshard.plan.rounds))  # a sync may take

    def begin(self) -> bytes:
        """Start a sync; what the engine process of this rank has to be sent over HTTP."""
        self._sync += 1
        self._handover.begin(self._sync)
        request = json.dumps({"ticket": self._handover.ticket, "sync": self._sync})
        # SGLang wants named tensors; ours has a name only.
        return pickle.dumps([(request, torch.zeros(1))])

    def run(
        self, source: WeightSource, servers: Collection[int], alive: Callable[[], bool]
    ) -> Problem | None:
        """Take part in the rounds; collective. `servers`: which ones are loaded.

        `alive`: whether this rank's engine is still there. Returns what went wrong with it.
        """
        reshard, handover = self._reshard, self._handover
        tp = reshard.plan.engine.tp
        receivers = {server * tp + i for server in servers for i in range(tp)}
        problem, expected = None, list[int]()
        reshard.begin(source)
        for round_ in range(len(reshard.plan.rounds)):
            buffer = handover.buffers[round_ % 2]
            if reshard.rank in receivers and problem is None:
                free = partial(handover.wait_free, round_, self._timeout_s, alive)
                problem = _problem_of(free)
            expected += reshard.round(round_, source, buffer, receivers)
            handover.publish(round_)
        if reshard.rank not in receivers:
            return None
        found: list[int] = []
        if problem is None:
            problem = _problem_of(lambda: found.extend(handover.wait_done(self._timeout_s, alive)))
        handover.give_up()
        if problem is not None:
            return Problem(problem, restart=True)
        return self._differences(expected, found)

    def _differences(self, expected: list[int], found: list[int]) -> Problem | None:
        pieces = [piece for pieces in self._handover.layout.rounds for piece in pieces]
        wrong = [
            piece.parameter
            for piece, sent, loaded in zip(pieces, expected, found, strict=True)
            if sent != loaded
        ]
        if not wrong:
            return None
        names = ", ".join(dict.fromkeys(wrong).keys())
        return Problem(f"checksums of sent and loaded weights differ: {names}", restart=False)


def _problem_of(wait: Callable[[], None]) -> str | None:
    try:
        wait()
    except HandoverError as error:  # the engine's failure: it is loaded again, others go on
        return str(error)
    return None
