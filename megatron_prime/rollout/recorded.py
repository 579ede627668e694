"""Training on rollouts from disk: prompts, engine and verifier that play back what was recorded.

For looking at training alone: the same rollouts again and again, without a rollout engine. They
count as the present policy's, so with rollouts of several steps everything but the first step is
off-policy. `rollout/mismatch_kl` says by how much: the recorded log-probs are the old policy's.
`policy/approx_kl` does not, for its old log-probs are the present policy's, as in any run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prime.config import ConfigError
from megatron_prime.protocols import Tally, WeightSource
from megatron_prime.runtime.rollout_files import RolloutFileError, read_steps
from megatron_prime.types import Group, Metrics, Prompt, Sampling, VerifiedGroup


class RecordedRollouts:
    """The PromptStream, RolloutEngine and Verifier roles over the groups of a folder."""

    version = -1

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """Read all groups of `folder`. Raises RolloutFileError when there are none."""
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._groups = tuple(read_steps(folder))
        self._waiting = deque(self._groups)
        self._taken: dict[int, VerifiedGroup] = {}  # by prompt_id, of the last `take`

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts as they were recorded; RolloutFileError when none are left."""
        if count > len(self._waiting):
            raise RolloutFileError(
                f"debug.rollouts_from: {len(self._waiting)} of {len(self._groups)} groups in "
                f"{self.folder} are left, wanted {count} more; lower run.steps or "
                "rollout.prompts_per_step, or record more"
            )
        taken = [self._waiting.popleft() for _ in range(count)]
        self._taken = {group.prompt.prompt_id: group for group in taken}
        if len(self._taken) < count:
            raise RolloutFileError(
                f"debug.rollouts_from: {self.folder} has a prompt twice among {count} groups; take "
                "the rollout.prompts_per_round that they were recorded with"
            )
        return [group.prompt for group in taken]

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Nothing: what was put back when it was recorded comes again further on, sampled anew."""

    def state_dict(self) -> dict[str, Any]:
        """How many groups were taken."""
        return {"taken": len(self._groups) - len(self._waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after as many; groups of later steps may have come to the folder since."""
        self._waiting = deque(self._groups[state["taken"] :])

    def load_weights(self, weights: WeightSource, version: int) -> None:
        """Take no weights."""
        self.version = version

    def take_metrics(self) -> Metrics:
        """None: nothing is generated."""
        return {}

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, enough: Tally | None = None
    ) -> Iterator[Group]:
        """The recorded groups of this rank's share; ConfigError if they are of another size.

        All of them, whatever is `enough`: playing them back takes no time.
        """
        for prompt in prompts[self.rank :: self.world_size]:
            group = self._taken[prompt.prompt_id]
            if len(group.rollouts) != sampling.samples:
                raise ConfigError(
                    f"rollout.group_size: found {sampling.samples}, but {self.folder} was recorded "
                    f"with {len(group.rollouts)}; set it to that"
                )
            now = (
                replace(rollout, policy_version=self.version, older_spans=())
                for rollout in group.rollouts
            )
            yield Group(prompt, tuple(now))

    def verify(self, groups: Iterable[Group], enough: Tally | None = None) -> list[VerifiedGroup]:
        """The recorded outcome rewards."""
        verified = [
            replace(self._taken[group.prompt.prompt_id], rollouts=group.rollouts)
            for group in groups
        ]
        if enough is not None:
            for group in verified:
                enough.add(group)
        return verified
