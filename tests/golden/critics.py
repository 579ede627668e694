"""Expected values of what needs a critic, token by token in plain Python.

A part of make_prime_vectors.py, whose inputs and conventions these values share. GAE stands here as
what it was made from, the mean of n-step returns with weights (1 - lambda) lambda^(n-1), the last
of which takes all that is left (Schulman et al. 2016, Eq. 16), and not as a sum of deltas.
"""

from __future__ import annotations

import math

CLIP = 0.5


def critics(batch):
    """Advantages and returns of `values`, and the loss of values that have moved from there."""
    process = batch.tokens(lambda i, t: batch.beta * (batch.prm[i][t] - batch.ref[i][t]))
    at_the_end = batch.tokens(lambda i, t: batch.outcomes[i] * (t == batch.lengths[i] - 1))
    both = batch.tokens(lambda i, t: process[i][t] + at_the_end[i][t])
    found = {}
    for name, rewards in (("outcome", at_the_end), ("prime", both)):
        for gamma, mix in ((1.0, 1.0), (0.99, 0.95), (0.9, 0.0)):
            returns = batch.tokens(
                lambda i, t, given=(rewards, gamma, mix): mixed_return(batch, i, t, *given)
            )
            key = f"gae.{name}.g{gamma}.l{mix}"
            found[f"{key}.returns"] = returns
            found[f"{key}.advantage"] = batch.tokens(
                lambda i, t, returns=returns: returns[i][t] - batch.values[i][t]
            )
    return found | loss(batch, found["gae.prime.g1.0.l1.0.returns"])


def mixed_return(batch, i, t, rewards, gamma, mix):
    """The lambda-return of token t."""
    left = batch.lengths[i] - t

    def n_steps(n):
        known = math.fsum(gamma**k * rewards[i][t + k] for k in range(n))
        return known + (gamma**n * batch.values[i][t + n] if n < left else 0.0)

    parts = [(1 - mix) * mix ** (n - 1) * n_steps(n) for n in range(1, left)]
    return math.fsum([*parts, mix ** (left - 1) * n_steps(left)])


def loss(batch, returns):
    """The clipped value loss, its gradient and the share of clipped tokens; case by case."""
    now = batch.tokens(lambda i, t: batch.values[i][t] + (0.7 if (i + t) % 2 else -0.1))
    tokens = sum(batch.lengths)

    def term(i, t):
        """Half the square, and its slope."""
        old, wanted, found = batch.values[i][t], returns[i][t], now[i][t]
        edge = old + math.copysign(CLIP, found - old)
        towards = abs(found - old) > CLIP and abs(edge - wanted) > abs(found - wanted)
        if towards:
            return (edge - wanted) ** 2 / 2, 0.0
        return (found - wanted) ** 2 / 2, found - wanted

    terms = [term(i, t) for i in batch.rows for t in range(batch.lengths[i])]
    plain = batch.tokens(lambda i, t: (now[i][t] - returns[i][t]) ** 2 / 2)
    unexplained = variance(batch, now, returns) / variance(batch, None, returns)
    return {
        "value.moved": now,
        "value.loss": {
            "loss": math.fsum(x for x, _ in terms) / tokens,
            "clipfrac": sum(slope == 0 for _, slope in terms) / tokens,
        },
        "value.loss.unclipped": math.fsum(batch.flat(plain)) / tokens,
        "value.grad": batch.tokens(lambda i, t: term(i, t)[1] / tokens),
        "value.explained_variance": 1 - unexplained,
    }


def variance(batch, values, returns):
    """Of the returns, less the values if there are any."""
    gaps = [
        returns[i][t] - (values[i][t] if values else 0.0)
        for i in batch.rows
        for t in range(batch.lengths[i])
    ]
    centre = math.fsum(gaps) / len(gaps)
    return math.fsum((gap - centre) ** 2 for gap in gaps) / (len(gaps) - 1)
