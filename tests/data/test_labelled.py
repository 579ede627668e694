"""Groups of labelled responses: what makes one, what is dropped, what is held out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_prime.data.answered import Answered
from megatron_prime.data.labelled import as_batch, dealt, fingerprint, labelled_groups, split
from megatron_prime.data.rows import DataError


def row(prompt, *labels, length=2):
    responses = tuple((10 + i,) * length for i in range(len(labels)))
    return Answered("line 1", None, (prompt,) * 3, responses, labels)


def test_rows_of_a_prompt_are_put_together_in_whole_groups():
    rows = [row(1, 1.0), row(2, 1.0, 0.0), row(1, 0.0, 0.5), row(2, 0.0, 1.0, 0.0)]
    found = labelled_groups(rows, 2, 5, mixed_only=False)
    assert [(g.prompt_ids[0], g.labels) for g in found.groups] == [
        (1, (1.0, 0.0)),
        (2, (1.0, 0.0)),
        (2, (0.0, 1.0)),
    ]
    assert (found.too_long, found.left_over, found.equal) == (0, 2, 0)


@pytest.mark.parametrize(
    ("labels", "size", "wanted"),
    [
        ((1, 1, 0, 0), 2, [(1, 0), (1, 0)]),
        ((1, 1, 1, 1, 0, 0, 0, 0), 4, [(1, 1, 0, 0)] * 2),
        ((0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1), 3, [(0, 0.5, 1)] * 3),
        ((0, 0, 0, 0, 0, 0, 1), 3, [(0, 0, 0), (0, 0, 1)]),  # the 1 is not what is left over
        ((1, 0, 0, 0, 0, 0, 0), 3, [(0, 0, 0), (1, 0, 0)]),
        ((1, 0), 3, []),
    ],
)
def test_data_sorted_by_label_has_pairs(labels, size, wanted):
    responses = [((i,), label) for i, label in enumerate(labels)]
    found = dealt(responses, size)
    assert [tuple(label for _, label in group) for group in found] == wanted
    used = [ids for group in found for ids, _ in group]
    assert len(used) == len(set(used)) == len(labels) // size * size
    assert all(group == sorted(group) for group in found), "in their order"


def test_what_can_t_be_learnt_is_counted():
    rows = [
        row(1, 1.0, 1.0),
        row(2, 0.0, 1.0),
        replace(row(3, 0.0, 1.0), responses=((1,), (2,) * 9)),
    ]
    found = labelled_groups(rows, 2, 5, mixed_only=True)
    assert [g.prompt_ids[0] for g in found.groups] == [2]
    assert (found.too_long, found.left_over, found.equal) == (1, 1, 1)
    assert found.told("here") == (
        "here: 1 groups; dropped: 1 responses longer than train_prm.max_length, 1 responses that "
        "fill no group of rollout.group_size, 1 groups of equal labels"
    )
    assert len(labelled_groups(rows, 2, 5, mixed_only=False).groups) == 2
    with pytest.raises(DataError, match=r"0 groups; dropped: 6 responses longer.*nothing is left"):
        labelled_groups(rows, 2, 3, mixed_only=False)


def test_held_out_prompts_keep_all_their_groups_and_don_t_depend_on_the_order():
    groups = labelled_groups([row(n, 1.0, 0.0, 0.0, 1.0) for n in range(20)], 2, 5, False).groups
    learnt, held = split(groups, 0.25)
    assert len(held) == 10, "two groups of each of five prompts"
    assert not {g.prompt_ids for g in learnt} & {g.prompt_ids for g in held}
    assert {*learnt, *held} == {*groups}
    assert set(split(groups[::-1], 0.25)[1]) == set(held)
    assert split(groups, 0.0) == (groups, ())
    assert len(split(groups, 0.001)[1]) == 2, "at least one prompt"


def test_a_batch_is_that_of_a_step():
    groups = labelled_groups([row(1, 1.0, 0.5), row(2, 0.0, 1.0, length=3)], 2, 9, False).groups
    batch = as_batch(groups)
    assert batch.group_size == 2
    assert [s.prompt_length for s in batch.sequences] == [3] * 4
    assert batch.sequences[3].token_ids == (2, 2, 2, 11, 11, 11)
    assert batch.response_mask.sum(1).tolist() == [2, 2, 3, 3]
    assert torch.equal(batch.outcome_rewards, torch.tensor([1.0, 0.5, 0.0, 1.0]))


def test_the_fingerprint_knows_tokens_and_labels():
    def of(*rows):
        return fingerprint(labelled_groups(rows, 2, 9, False).groups)

    first = of(row(1, 1.0, 0.0))
    others = [of(row(1, 1.0, 0.5)), of(row(2, 1.0, 0.0)), of(row(1, 1.0, 0.0, length=3))]
    assert first == of(row(1, 1.0, 0.0))
    assert len({first, *others}) == 4
