"""Labelled responses for the offline training of a PRM, in groups of equal size.

Whatever the rows look like, what is learnt is a group: `rollout.group_size` responses to one prompt
with their labels, as a run's step has them. Rows of the same prompt are put together; of each
prompt's responses as many whole groups are made as there are, and each gets its share of every
label, so that files sorted by label have pairs, too. What is left over, too long, or (for losses of
pairs) without two different labels is counted and not learnt.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_prime.data.answered import Answered
from megatron_prime.data.rows import DataError
from megatron_prime.types import RolloutBatch, TokenSequence


@dataclass(frozen=True, slots=True)
class LabelledGroup:
    """Responses to one prompt, each with its label in [0, 1]."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    labels: tuple[float, ...]

    @property
    def mixed(self) -> bool:
        """Whether there is a pair of different labels."""
        return len(set(self.labels)) > 1


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """What can be learnt of the rows, and what can't."""

    groups: tuple[LabelledGroup, ...]
    too_long: int  # responses
    left_over: int  # responses that fill no group
    equal: int  # groups that were dropped because their labels are

    def told(self, source: object) -> str:
        """How much there is, in a line."""
        dropped = {
            "responses longer than train_prm.max_length": self.too_long,
            "responses that fill no group of rollout.group_size": self.left_over,
            "groups of equal labels": self.equal,
        }
        lost = [f"{count} {what}" for what, count in dropped.items() if count]
        return f"{source}: {len(self.groups)} groups; dropped: {', '.join(lost) or 'nothing'}"


Response = tuple[tuple[int, ...], float]  # tokens and label


def labelled_groups(
    rows: Sequence[Answered],
    group_size: int,
    max_length: int,
    mixed_only: bool,
    use: str = "learn",
) -> LabelledSet:
    """The groups of the rows, which have labels; DataError if there are none.

    `max_length`: of prompt and response. `mixed_only`: drop groups whose labels are all equal.
    `use`: what they are for, said where there are none.
    """
    by_prompt: dict[tuple[int, ...], list[Response]] = {}
    too_long = 0
    for row in rows:
        assert row.labels is not None, "read as labelled"
        for response, label in zip(row.responses, row.labels, strict=True):
            if len(row.prompt_ids) + len(response) > max_length:
                too_long += 1
            else:
                by_prompt.setdefault(row.prompt_ids, []).append((response, label))
    groups = [
        LabelledGroup(prompt, *zip(*group, strict=True))
        for prompt, found in by_prompt.items()
        for group in dealt(found, group_size)
    ]
    left_over = sum(map(len, by_prompt.values())) - group_size * len(groups)
    kept = tuple(group for group in groups if group.mixed or not mixed_only)
    found = LabelledSet(kept, too_long, left_over, len(groups) - len(kept))
    if not kept:
        raise DataError(
            f"{found.told('labelled responses')}; nothing is left to {use}: bring more, raise "
            'train_prm.max_length, lower rollout.group_size, or take prm.loss = "ce"'
        )
    return found


def dealt(responses: Sequence[Response], group_size: int) -> list[list[Response]]:
    """As many whole groups as there are, among which each label is shared as evenly as can be.

    What is left over is of all labels, too; within a group responses keep their order.
    """
    count = len(responses) // group_size
    taken = count * group_size
    by_label = sorted(range(len(responses)), key=lambda i: responses[i][1])
    kept = [by_label[(2 * i + 1) * len(by_label) // (2 * taken)] for i in range(taken)]
    return [[responses[i] for i in sorted(kept[group::count])] for group in range(count)]


def split(
    groups: Sequence[LabelledGroup], share: float
) -> tuple[tuple[LabelledGroup, ...], tuple[LabelledGroup, ...]]:
    """Groups to learn from and groups to hold out: of `share` of the prompts, all their groups.

    Which prompts these are depends on their tokens alone, not on their order.
    """
    prompts = sorted({group.prompt_ids for group in groups}, key=_digest)
    held = set(prompts[: math.ceil(share * len(prompts))])
    learnt = tuple(group for group in groups if group.prompt_ids not in held)
    return learnt, tuple(group for group in groups if group.prompt_ids in held)


def sequences_of(groups: Iterable[LabelledGroup]) -> Iterator[TokenSequence]:
    """All responses with their prompts."""
    for group in groups:
        for response in group.responses:
            yield TokenSequence(group.prompt_ids + response, len(group.prompt_ids))


def as_batch(groups: Sequence[LabelledGroup]) -> RolloutBatch:
    """Groups as a step's rollouts; nobody says with which log-probs they were sampled: 0."""
    sequences = tuple(sequences_of(groups))
    lengths = torch.tensor([sequence.response_length for sequence in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    labels = torch.tensor([label for group in groups for label in group.labels])
    return RolloutBatch(sequences, len(groups[0].labels), mask, labels, torch.zeros(mask.shape))


def fingerprint(groups: Sequence[LabelledGroup]) -> str:
    """16 hex digits that change with any token or label."""
    digest = hashlib.blake2b(digest_size=8)
    for group in groups:
        for ids in (group.prompt_ids, *group.responses):
            digest.update(array("q", [len(ids), *ids]))
        digest.update(repr(group.labels).encode())
    return digest.hexdigest()


def _digest(token_ids: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(array("q", token_ids), digest_size=8).digest()
