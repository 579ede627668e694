"""The decode loop against plain forwards of the whole sequence: no cache, no padding, no batch."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from megatron_prime.rollout.decoding import Decoder, Request, decode
from megatron_prime.types import Sampling

NEVER = (999,)  # an end-of-sequence id outside the vocabulary


def requests_of(prompts, samples):
    return [Request(prompt, sample) for prompt in prompts for sample in range(samples)]


@torch.no_grad()
def full_logprobs(model, prompt, response, temperature):
    """log_softmax(logits / temperature) before each response token, [len(response), V]."""
    logits = model(torch.tensor([prompt.token_ids + response])).logits[0]
    return (logits[len(prompt.token_ids) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_full_forward(model, prompts, temperature):
    requests = requests_of(prompts, 3)
    responses = decode(model, requests, Sampling(3, temperature, 20, seed=5), NEVER)
    for request, response in zip(requests, responses, strict=True):
        wanted = full_logprobs(model, request.prompt, response.token_ids, temperature)
        tokens = torch.tensor(response.token_ids)[:, None]
        torch.testing.assert_close(
            torch.tensor(response.logprobs), wanted.gather(-1, tokens)[:, 0], rtol=0, atol=1e-5
        )


def test_greedy_is_the_argmax_of_full_forwards(model, prompts):
    responses = decode(model, requests_of(prompts, 1), Sampling(1, 0.0, 16, seed=0), NEVER)
    for prompt, response in zip(prompts, responses, strict=True):
        wanted = full_logprobs(model, prompt, response.token_ids, 1.0)
        assert response.token_ids == tuple(wanted.argmax(-1).tolist())
        torch.testing.assert_close(
            torch.tensor(response.logprobs), wanted.max(-1).values, rtol=0, atol=1e-5
        )


def test_cutting_the_batch_down_changes_nothing(model, prompts, monkeypatch):
    requests = requests_of(prompts, 4)
    sampling = Sampling(4, 1.0, 40, seed=2)
    eos_ids = tuple(range(6))  # responses of very different lengths
    with_cuts = decode(model, requests, sampling, eos_ids)
    cuts = []
    monkeypatch.setattr(Decoder, "take_rows", record_into(cuts, Decoder.take_rows))
    alone = [decode(model, [request], sampling, eos_ids)[0] for request in requests]
    assert len(cuts) == len(requests), "one row has nothing to be cut down to"
    assert [r.token_ids for r in with_cuts] == [r.token_ids for r in alone]
    for one, other in zip(with_cuts, alone, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def record_into(calls, method):
    def recorded(self, rows):
        calls.append(len(rows))
        return method(self, rows)

    return recorded


def test_rows_that_ended_leave_the_batch(model, prompts, monkeypatch):
    cuts = []
    monkeypatch.setattr(Decoder, "take_rows", record_into(cuts, Decoder.take_rows))
    decode(model, requests_of(prompts, 4), Sampling(4, 1.0, 40, seed=2), tuple(range(6)))
    assert cuts[0] == 28
    assert len(cuts) > 2, "no row was ever dropped"
    assert all(after <= before / 2 for before, after in itertools.pairwise(cuts))


def test_ends_with_the_first_end_of_sequence_token_or_is_cut(model, prompts):
    eos_ids = (4, 9, 30)
    responses = decode(model, requests_of(prompts, 8), Sampling(8, 1.0, 12, seed=1), eos_ids)
    stopped = [response for response in responses if response.stopped]
    cut = [response for response in responses if not response.stopped]
    assert stopped
    assert cut, "the sample has both endings"
    for response in stopped:
        assert response.token_ids[-1] in eos_ids
        assert not set(response.token_ids[:-1]) & set(eos_ids)
    for response in cut:
        assert len(response.token_ids) == 12
        assert not set(response.token_ids) & set(eos_ids)
    for response in responses:
        assert len(response.logprobs) == len(response.token_ids)


def test_an_end_at_the_last_allowed_token_counts_as_stopped(model, prompts):
    (free,) = decode(model, requests_of(prompts[:1], 1), Sampling(1, 1.0, 6, seed=3), NEVER)
    assert free.token_ids[5] not in free.token_ids[:5], "choose another seed"
    (response,) = decode(
        model, requests_of(prompts[:1], 1), Sampling(1, 1.0, 6, seed=3), (free.token_ids[5],)
    )
    assert response.stopped
    assert response.token_ids == free.token_ids


def test_first_tokens_are_drawn_from_the_model(model, prompts):
    count = 2000
    prompt = prompts[1]
    responses = decode(model, requests_of([prompt], count), Sampling(count, 1.0, 1, seed=4), NEVER)
    observed = torch.tensor([r.token_ids[0] for r in responses]).bincount(minlength=64)
    with torch.no_grad():
        expected = model(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1) * count
    frequent = expected >= 5  # the rest is pooled, as a chi-square test wants it
    cells = torch.cat([observed[frequent], observed[~frequent].sum()[None]])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    freedom = len(cells) - 1
    chi_square = ((cells - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    assert freedom >= 5, "the model's distribution is too narrow to test anything"
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_broken_weights_are_reported(model, prompts):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            decode(broken, requests_of(prompts, 2), Sampling(2, temperature, 4, seed=0), NEVER)
