"""The implicit process reward: how much likelier the PRM finds a token than the reference does.

A model trained on outcomes alone, with the log-ratio of the whole response to a reference as its
logit, learns a Q-function on the way: the log-ratio summed up to token t is a soft expectation of
the outcome after t. What one token adds to it, its own log-ratio, is then a process reward that
nobody had to label (arXiv 2412.01981).
"""

from __future__ import annotations

from torch import Tensor

from megatron_prime.algorithm.masked import check_tokens, zero_padding


def implicit_rewards(
    prm_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """Token rewards r_t = beta * (log prm(y_t) - log ref(y_t)), PRIME Eq. 3: [N, T], 0 on padding.

    `prm_logprobs` and `ref_logprobs` are [N, T] in nats, at temperature 1; gradients flow into
    both. The reward of a response is the sum over its tokens, not the mean. Raises ValueError for
    shapes that differ and empty responses.
    """
    check_tokens(response_mask, prm_logprobs=prm_logprobs, ref_logprobs=ref_logprobs)
    prm = zero_padding(prm_logprobs, response_mask)
    ref = zero_padding(ref_logprobs, response_mask)
    return beta * (prm - ref)
