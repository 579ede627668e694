from __future__ import annotations

import pytest
import torch

from megatron_prime.algorithm.granularity import gathered, reward_places


def test_rewards_move_to_the_ends_of_their_steps(golden):
    rewards, mask = golden["implicit.token_reward"], golden.mask
    steps = reward_places(mask, "step", golden["steps.ends"].bool())
    close(gathered(rewards, steps), golden["implicit.step_granularity"])


def test_a_response_is_rewarded_at_its_last_token(vectors):
    places = reward_places(vectors.mask, "response")
    wanted = vectors["implicit.whole_granularity"]
    close(gathered(vectors["implicit.token_reward"], places), wanted)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_tokens_keep_theirs(golden):
    places = reward_places(golden.mask, "token")
    rewards = golden["implicit.token_reward"]
    assert torch.equal(gathered(rewards, places), rewards)


@pytest.mark.parametrize("granularity", ["token", "step", "response"])
def test_no_reward_is_lost(golden, granularity):
    rewards, ends = golden["implicit.token_reward"], golden["steps.ends"].bool()
    places = reward_places(golden.mask, granularity, ends)
    close(gathered(rewards, places).sum(dim=1), rewards.sum(dim=1))


def test_the_last_token_ends_a_step_and_padding_none():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ends = torch.tensor([[False, False, True], [True, False, False]])
    found = reward_places(mask, "step", ends).tolist()
    assert found == [[False, True, False], [True, False, True]]


def test_step_ends_of_another_shape_are_refused(golden):
    with pytest.raises(ValueError, match=r"step_ends: found shape \[8, 3\], wanted \[8, 7\]"):
        reward_places(golden.mask, "step", golden.mask[:, :3])
