"""One rank: against values by hand, log_softmax and finite differences.

The same on two and four ranks: tests/distributed/megatron_cases.py, vocab_parallel.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_prime.models.logprobs import (
    vocab_parallel_logprobs_and_entropy,
)


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """The group of a single rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_known_values(alone: dist.ProcessGroup) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 7.0], [1.0, 2.0, 3.0, 7.0]])
    logprobs, entropy = vocab_parallel_logprobs_and_entropy(logits, torch.tensor([0, 2]), 3, alone)
    # by hand: uniform over three; and softmax(1, 2, 3) = 0.0900, 0.2447, 0.6652
    assert torch.allclose(logprobs, torch.tensor([-1.0986123, -0.4076060]), atol=1e-6)
    assert torch.allclose(entropy, torch.tensor([1.0986123, 0.8323946]), atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 300.0, 30000.0])
def test_agrees_with_log_softmax_where_exp_would_overflow(
    scale: float, alone: dist.ProcessGroup
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11) * scale
    targets = torch.randint(0, 11, (5,))
    logprobs, entropy = vocab_parallel_logprobs_and_entropy(logits, targets, 11, alone)
    logp_V = logits.double().log_softmax(-1)
    truth = logp_V.gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropy.double(), -(logp_V.exp() * logp_V).sum(-1), rtol=1e-5, atol=1e-5
    )


def test_gradients_by_finite_differences(alone: dist.ProcessGroup) -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 6)
    targets = torch.tensor([4, 0])
    weights = torch.randn(2, 2)

    def value(at: torch.Tensor) -> torch.Tensor:
        both = vocab_parallel_logprobs_and_entropy(at, targets, 5, alone)
        return sum((w * x).sum() for w, x in zip(weights, both, strict=True))

    at = logits.clone().requires_grad_()
    value(at).backward()
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(6)):
        step = torch.zeros_like(logits)
        step[tuple(index)] = 1e-2
        numeric = (value(logits + step) - value(logits - step)) / 2e-2
        assert at.grad[tuple(index)].item() == pytest.approx(numeric.item(), abs=2e-3)
    assert (at.grad[:, 5] == 0).all()  # the padded column


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_has_a_gradient_of_its_own(which: int, alone: dist.ProcessGroup) -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 8)
    targets = torch.tensor([1, 2, 3])
    mine = logits.clone().requires_grad_()
    vocab_parallel_logprobs_and_entropy(mine, targets, 8, alone)[which].sum().backward()
    truth = logits.clone().requires_grad_()
    logp_V = truth.log_softmax(-1)
    (logp_V.gather(-1, targets[:, None]), -(logp_V.exp() * logp_V))[which].sum().backward()
    torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-5, atol=1e-6)


def test_logprobs_alone_and_bf16_logits(alone: dist.ProcessGroup) -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 9).bfloat16().requires_grad_()
    targets = torch.tensor([0, 8, 3, 3])
    logprobs, _ = vocab_parallel_logprobs_and_entropy(logits, targets, 9, alone)
    assert logprobs.dtype == torch.float32
    truth = logits.detach().float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.detach(), truth, rtol=0, atol=1e-6)
    logprobs.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
