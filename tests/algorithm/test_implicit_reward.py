from __future__ import annotations

import pytest
import torch

from megatron_prime.algorithm.implicit_reward import implicit_rewards


@pytest.mark.parametrize("name", ["implicit.token_reward", "implicit.token_logratio"])
def test_rewards_are_the_scaled_log_ratio(vectors, name):
    beta = vectors.beta if name == "implicit.token_reward" else 1.0
    rewards = implicit_rewards(vectors.prm, vectors.ref, vectors.mask, beta)
    torch.testing.assert_close(rewards, vectors[name], rtol=0, atol=1e-10)


def test_a_response_earns_the_sum_of_its_tokens(vectors):
    rewards = implicit_rewards(vectors.prm, vectors.ref, vectors.mask, vectors.beta)
    wanted = vectors["implicit.sequence_reward"]
    torch.testing.assert_close(rewards.sum(dim=1), wanted, rtol=0, atol=1e-10)


def test_garbage_on_padding_changes_neither_value_nor_gradient(golden, spoil):
    prm = spoil(golden.prm, golden.mask).requires_grad_()
    ref = spoil(golden.ref, golden.mask).requires_grad_()
    rewards = implicit_rewards(prm, ref, golden.mask, beta=0.05)
    (rewards * torch.arange(1.0, 8.0)).sum().backward()
    assert torch.equal(
        rewards.detach(), implicit_rewards(golden.prm, golden.ref, golden.mask, 0.05)
    )
    wanted = 0.05 * torch.arange(1.0, 8.0, dtype=torch.float64) * golden.mask
    torch.testing.assert_close(prm.grad, wanted)
    torch.testing.assert_close(ref.grad, -wanted)


def test_bfloat16_log_probs_are_subtracted_in_float32(golden):
    prm, ref = golden.prm.bfloat16(), golden.ref.bfloat16()
    rewards = implicit_rewards(prm, ref, golden.mask, beta=0.05)
    assert rewards.dtype == torch.float32
    wanted = torch.where(golden.mask, 0.05 * (prm.double() - ref.double()), 0.0)
    torch.testing.assert_close(rewards.double(), wanted, rtol=1e-6, atol=0)


def test_log_probs_of_another_shape_are_refused(golden):
    with pytest.raises(ValueError, match="ref_logprobs: found shape"):
        implicit_rewards(golden.prm, golden.ref[:, :3], golden.mask, beta=0.05)
