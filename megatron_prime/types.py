"""What flows through one PRIME step; each stage returns a new frozen type: mypy checks their order.

Shapes: N rollouts of the step (rows of one group are contiguous, N = prompts * group_size), T the
longest response. Column t of row i is the t-th response token of rollout i, its end-of-sequence
token included; what lies beyond `response_mask` means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_prime.masking import ended

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem, ready to be continued by the policy."""

    prompt_id: int  # row in the training data
    token_ids: tuple[int, ...]
    ground_truth: str
    ability: str  # "math" or "code": chooses the checker
    data_source: str


@dataclass(frozen=True, slots=True)
class EvalSet:
    """The problems of a benchmark; `prompt_id` is the row in its file."""

    name: str
    prompts: tuple[Prompt, ...]
    ids: tuple[str, ...]  # what the file calls them
    max_tokens: int  # of a response


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a batch of prompts is continued."""

    samples: int  # responses per prompt
    temperature: float  # 0 is greedy
    max_tokens: int
    seed: int  # with prompt_id and the sample's number it fixes the random stream of a response


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """So many tokens in a row, sampled by one policy."""

    tokens: int
    version: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response; `response_ids` ends with the end-of-sequence token unless cut."""

    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]  # the engine's, per token, at the sampling temperature
    finish_reason: Literal["stop", "length"]
    policy_version: int
    text: str  # the decoded response, without special tokens
    older_spans: tuple[VersionSpan, ...] = ()  # its first tokens, if earlier policies sampled them

    def __post_init__(self) -> None:
        """ValueError if the older spans leave no token to `policy_version`."""
        older = sum(span.tokens for span in self.older_spans)
        if self.older_spans and older >= len(self.response_ids):
            raise ValueError(
                f"found older_spans of {older} tokens in a response of {len(self.response_ids)}, "
                "wanted fewer: its last token is of policy_version"
            )

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        """Which policy sampled which tokens: spans that cover the whole response, in order."""
        rest = len(self.response_ids) - sum(span.tokens for span in self.older_spans)
        return (*self.older_spans, VersionSpan(rest, self.policy_version))


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class VerifiedGroup:
    """A group with the outcome reward of each rollout, in [0, 1]."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    outcome_rewards: tuple[float, ...]
    checker_failures: int  # checks that crashed or ran out of time; they scored 0

    @property
    def accuracy(self) -> float:
        """Mean outcome reward."""
        return sum(self.outcome_rewards) / len(self.outcome_rewards)

    @property
    def policy_version(self) -> int:
        """The version all tokens of all rollouts were sampled with.

        ValueError if they differ, for leave-one-out needs one policy.
        """
        versions = {span.version for rollout in self.rollouts for span in rollout.versions}
        if len(versions) != 1:
            raise ValueError(
                f"prompt {self.prompt.prompt_id}: tokens of policy versions {sorted(versions)} "
                "in one group; only rollout.keep_partial mixes them"
            )
        return versions.pop()


Groups = tuple[VerifiedGroup, ...]
Collected = tuple[Groups, Groups, Metrics]  # a step's batch, the surplus, figures


def unanswered(prompts: Sequence[Prompt], groups: Sequence[VerifiedGroup]) -> list[Prompt]:
    """The prompts without a group, in their order."""
    answered = {group.prompt.prompt_id for group in groups}
    return [prompt for prompt in prompts if prompt.prompt_id not in answered]


def outcome_rewards(groups: Sequence[VerifiedGroup]) -> Tensor:
    """All outcome rewards, groups one after the other: float32 [N]."""
    rewards = [reward for group in groups for reward in group.outcome_rewards]
    return torch.tensor(rewards, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and its response as the models see them."""

    token_ids: tuple[int, ...]
    prompt_length: int  # the first response token is token_ids[prompt_length]

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one step as padded tensors, the same on every rank."""

    sequences: tuple[TokenSequence, ...]  # N
    group_size: int
    response_mask: Tensor  # bool [N, T]
    outcome_rewards: Tensor  # float32 [N]
    rollout_logprobs: Tensor  # float32 [N, T], 0 on padding
    learns: Tensor | None = None  # bool [N], rows that policy and critic learn from; None: all

    @classmethod
    def from_groups(
        cls, groups: Sequence[VerifiedGroup], mixed: bool = False, masked: bool = False
    ) -> RolloutBatch:
        """Flatten groups of equal size, of one policy unless `mixed`; `masked`: see masking.py."""
        if not mixed and len(versions := {group.policy_version for group in groups}) != 1:
            raise ValueError(f"found groups of policy versions {sorted(versions)} in one batch")
        rows = [(group.prompt.token_ids, r) for group in groups for r in group.rollouts]
        rollouts = [rollout for _, rollout in rows]
        lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        logprobs = torch.zeros(mask.shape, dtype=torch.float32)
        found = chain.from_iterable(rollout.rollout_logprobs for rollout in rollouts)
        # Through numpy: it takes a seventh of what torch takes for millions of Python's numbers.
        logprobs[mask] = torch.from_numpy(np.fromiter(found, np.float32, int(lengths.sum())))
        return cls(
            sequences=tuple(TokenSequence(p + r.response_ids, len(p)) for p, r in rows),
            group_size=len(groups[0].rollouts),
            response_mask=mask,
            outcome_rewards=outcome_rewards(groups),
            rollout_logprobs=logprobs,
            learns=ended([rollout.finish_reason for rollout in rollouts]) if masked else None,
        )

    def select(self, rows: Tensor) -> RolloutBatch:
        """Only `rows` (int64 [n]), in their order; unless they are whole groups, torn apart."""
        return RolloutBatch(
            tuple(self.sequences[row] for row in rows.tolist()),
            self.group_size if self._are_whole_groups(rows) else 1,
            self.response_mask[rows],
            self.outcome_rewards[rows],
            self.rollout_logprobs[rows],
            None if self.learns is None else self.learns[rows],
        )

    def _are_whole_groups(self, rows: Tensor) -> bool:
        if len(rows) % self.group_size:
            return False
        firsts = rows[:: self.group_size]
        whole = (firsts[:, None] + torch.arange(self.group_size)).flatten()
        return not bool((firsts % self.group_size).any()) and torch.equal(rows, whole)


@dataclass(frozen=True, slots=True)
class OldLogprobs:
    """Log-probs of the policy before this step's update, as far as they were scored.

    The first mini-batch trains the very weights that scoring would take, so its training forward
    gives its old log-probs, too: they need no forward of their own. `or_else` is the way to use
    what is here, for it makes one say what stands in for the rest.
    """

    known: Tensor  # bool [N], the rows that were scored
    logprobs: Tensor  # float32 [N, T], 0 on padding; NaN in rows that were not scored

    @classmethod
    def scored(cls, batch: RolloutBatch, rows: Tensor, logprobs: Tensor) -> OldLogprobs:
        """Only `rows` (int64 [n]) of `batch` have `logprobs` [n, T'], of at most T columns."""
        known = torch.zeros(len(batch.sequences), dtype=torch.bool)
        known[rows] = True
        whole = torch.full(batch.response_mask.shape, torch.nan)
        whole[rows] = pad(logprobs, (0, whole.shape[1] - logprobs.shape[1]))
        return cls(known, whole)

    @classmethod
    def none(cls, batch: RolloutBatch) -> OldLogprobs:
        """Nothing was scored."""
        no_rows = torch.zeros(0, dtype=torch.int64)
        return cls.scored(batch, no_rows, batch.rollout_logprobs[no_rows])

    def or_else(self, logprobs: Tensor) -> Tensor:
        """What was scored, and `logprobs` for the other rows: [N, T'], of at most T columns."""
        device = logprobs.device
        mine = self.logprobs[:, : logprobs.shape[1]].to(device)
        return torch.where(self.known[:, None].to(device), mine, logprobs.detach())

    def select(self, rows: Tensor) -> OldLogprobs:
        """Only `rows` (int64 [n])."""
        return OldLogprobs(self.known[rows], self.logprobs[rows])


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Rollouts with the log-probs that the trainer's own models give them; no gradients."""

    rollouts: RolloutBatch
    old_logprobs: OldLogprobs
    ref_logprobs: Tensor | None  # float32 [N, T], what PRM or policy is compared with

    def select(self, rows: Tensor) -> ScoredBatch:
        """Only `rows` (int64 [n])."""
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        return ScoredBatch(self.rollouts.select(rows), self.old_logprobs.select(rows), ref)


@dataclass(frozen=True, slots=True)
class PrmUpdate:
    """What a PRM update leaves: log-probs of its training forwards (each row once), and figures."""

    forward_logprobs: Tensor  # float32 [N, T]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A scored batch with its advantages: all that the policy update needs."""

    scored: ScoredBatch
    process_rewards: Tensor | None  # float32 [N, T], 0 on padding; None in outcome-only runs
    advantages: Tensor  # float32 [N, T], 0 on padding

    def select(self, rows: Tensor) -> TrainBatch:
        """Only `rows` (int64 [n])."""
        rewards = None if self.process_rewards is None else self.process_rewards[rows]
        return TrainBatch(self.scored.select(rows), rewards, self.advantages[rows])


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """What a policy update leaves: the log-probs of before it, now of every row, and figures."""

    old_logprobs: Tensor  # float32 [N, T], 0 on padding
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class LoopState:
    """Where a run stands between two steps; what a checkpoint keeps beside the models."""

    step: int = 0  # steps done
    surplus: Groups = ()  # groups that passed the filter and were not needed
