from __future__ import annotations

import torch

from megatron_prime.rollout.sampling import choose_tokens, uniforms

BELOW_ONE = 1 - 2.0**-53  # the largest float64 that a uniform can be


def choose(logits, temperature, u):
    tokens, logprobs = choose_tokens(
        torch.tensor([logits]), temperature, torch.tensor([u], dtype=torch.float64)
    )
    return tokens.item(), logprobs.item()


def test_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist()
    drawn = [choose(logits, 1.0, u)[0] for u in (0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.6001, 0.99)]
    assert drawn == [0, 0, 1, 1, 2, 3, 3]


def test_temperature_reshapes_both_the_choice_and_the_logprob():
    logits = torch.tensor([0.2, 0.8]).log().tolist()
    token, logprob = choose(logits, 2.0, 0.32)  # sqrt(0.2) : sqrt(0.8) = 1/3 : 2/3
    assert token == 0
    torch.testing.assert_close(logprob, torch.tensor(1 / 3).log().item())


def test_temperature_zero_takes_the_most_likely_at_its_own_probability():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().tolist()
    token, logprob = choose(logits, 0.0, 0.99)
    assert token == 1
    torch.testing.assert_close(logprob, torch.tensor(0.5).log().item())


def test_tokens_without_probability_are_never_taken():
    never = -float("inf")
    logits = [never, 0.0, never, never, 0.0, never, never]
    for u in (0.0, 0.25, 0.49999, 0.5, 0.75, BELOW_ONE, 1.0):
        token, logprob = choose(logits, 1.0, u)
        assert token in (1, 4), u
        torch.testing.assert_close(logprob, torch.tensor(0.5).log().item())
    assert choose([-200.0, 0.0, -200.0], 1.0, BELOW_ONE)[0] == 1  # exp(-200) is 0 in fp32
    assert choose([-200.0, 0.0, -200.0], 1.0, 0.0)[0] == 1


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    count = 20_000
    u = uniforms(seed=11, prompt_id=0, sample=0, count=count)
    tokens, _ = choose_tokens(logits.expand(count, -1), 0.7, u)
    expected = (logits / 0.7).softmax(-1) * count
    chi_square = ((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand seeds


def test_uniforms_are_a_function_of_seed_prompt_and_sample():
    base = uniforms(1, 2, 3, 8)
    torch.testing.assert_close(base, uniforms(1, 2, 3, 8), rtol=0, atol=0)
    torch.testing.assert_close(base, uniforms(1, 2, 3, 50)[:8], rtol=0, atol=0)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2**40 + 1, 2, 3)):
        assert not torch.isclose(base, uniforms(*other, 8)).any(), other
    assert base.dtype == torch.float64
    assert 0 <= base.min() <= base.max() < 1
